//! The filter `tojson`, as transformers has it: Python's `json.dumps(x, ensure_ascii=False)`, which escapes no HTML.

use std::io::{self, Write};

use minijinja::value::{Kwargs, Value};
use minijinja::{Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// `value | tojson`, `value | tojson(indent=4)`.
pub(super) fn to_json(value: Value, indent: Option<usize>, keywords: Kwargs) -> Result<Value, Error> {
    let indent = indent.or(keywords.get::<Option<usize>>("indent")?);
    if keywords.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson(ensure_ascii=true) is not taken"));
    }
    keywords.assert_all_used()?;
    let mut json = Vec::new();
    let spaces = " ".repeat(indent.unwrap_or(0));
    let written = match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut json, OnOneLine)),
        Some(_) => value.serialize(&mut Serializer::with_formatter(&mut json, PrettyFormatter::with_indent(spaces.as_bytes()))),
    };
    let refused = |problem: String| Error::new(ErrorKind::BadSerialization, problem);
    written.map_err(|error| refused(error.to_string()))?;
    String::from_utf8(json).map(Value::from_safe_string).map_err(|error| refused(error.to_string()))
}

/// `{"a": 1, "b": [2, 3]}`: Python's separators.
struct OnOneLine;

impl Formatter for OnOneLine {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_array_value(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}
