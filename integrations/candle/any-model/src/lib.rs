//! Tests alone: tests/shared.rs.
