//! Updates of a mixture of experts, whose weights are stacked in one tensor or stored in one tensor for each expert.

use std::borrow::Cow;

use super::change::Piece;
use super::header::dimensions;
use super::layout::{Layout, Layouts};
use super::plan::{Planner, Target};
use super::refused;
use crate::adapter::{Factors, HostMatrix, module_of};
use crate::error::Result;

/// The model types whose stacked experts are stored `E×k×n`.
const IN_OUT: [&str; 6] = ["gpt_oss", "aria", "aria_text", "openai_privacy_filter", "qwen3_vl_moe", "qwen3_vl_moe_text"];
/// For each parameter of stacked experts, the tensors of one expert that together (stacked in this order) hold it, with their possible
/// names.
const APART: [(&str, &[&[&str]]); 4] = [
    ("gate_up_proj", &[&["gate_proj", "w1"], &["up_proj", "w3"]]),
    ("down_proj", &[&["down_proj", "w2"]]),
    ("gate_proj", &[&["gate_proj", "w1"]]),
    ("up_proj", &[&["up_proj", "w3"]]),
];

impl<'r> Planner<'r> {
    /// Plans the update of a parameter of experts. `A` is the stack of the `Aₑ`; column `q·E + e` of `B` is column q of `Bₑ`.
    pub(super) fn parameter(
        &mut self,
        (name, factors): (&str, &'r Factors),
        experts: usize,
        layouts: &Layouts<'_>,
    ) -> Result<()> {
        let [n, k] = [factors.b.rows(), factors.a.cols()];
        let shapes = [vec![experts, n, k], vec![experts, k, n]];
        let fits = |shape: &[usize]| shapes.iter().any(|want| shape == want) || experts == 1 && shape == [n, k];
        if let Some(target) = self.target(name, fits)? {
            return self.stacked(target, factors, experts, layouts);
        }
        for expert in 0..experts {
            self.single_expert(name, &of_expert(factors, experts, expert)?, expert)?;
        }
        Ok(())
    }

    fn stacked(&mut self, target: Target<'r>, factors: &'r Factors, experts: usize, layouts: &Layouts<'_>) -> Result<()> {
        let [n, k] = [factors.b.rows(), factors.a.cols()];
        let (straight, transposed) = (target.shape.ends_with(&[n, k]), target.shape.ends_with(&[k, n]));
        let in_out = match (straight, transposed) {
            (true, true) => {
                let mut types = layouts.config.iter().flat_map(|config| config.model_types()).peekable();
                let known = types.peek().is_some().then(|| types.any(|name| IN_OUT.contains(&name)));
                let requested = layouts.requested.map(|layout| layout == Layout::InOut);
                let what = "is square, and it is not known whether it is stored out × in or in × out";
                let unknown = || refused(self.base.path(), format!("`{}` {what}; give --layout", target.name));
                requested.or(known).ok_or_else(unknown)?
            }
            (_, transposed) => transposed,
        };
        let sides = if in_out { [k, n] } else { [n, k] };
        let want = if target.shape.len() == 2 { sides.to_vec() } else { [&[experts], &sides[..]].concat() };
        self.fits(&target, &want)?;
        let pieces = (0..experts).map(|expert| {
            let factors = Cow::Owned(of_expert(factors, experts, expert)?);
            Ok(Piece { first_row: expert * sides[0], factors, transposed: in_out, principal: None })
        });
        let pieces = pieces.collect::<Result<Vec<_>>>()?;
        let change = self.change(&target)?;
        (change.cols, change.pieces) = (sides[1], pieces);
        Ok(())
    }

    /// Plans the update of one expert that has tensors of its own.
    fn single_expert(&mut self, name: &str, factors: &Factors, expert: usize) -> Result<()> {
        let (above, parameter) = (module_of(name), name.rsplit('.').next().unwrap_or(name));
        let known = APART.iter().find(|(stacked, _)| *stacked == parameter).map(|(_, parts)| *parts);
        let own: [&[&str]; 1] = [&[parameter]];
        let parts = known.unwrap_or(&own);
        let rows = factors.b.rows() / parts.len();
        for (at, spellings) in parts.iter().enumerate() {
            let mut found = None;
            for spelling in spellings.iter() {
                let name = format!("{above}.{expert}.{spelling}.weight");
                found = found.or(self.target(&name, |shape| shape == [rows, factors.a.cols()])?);
            }
            let Some(target) = found else {
                let (shape, lacks) = (dimensions(&[rows, factors.a.cols()]), format!("has neither `{name}` nor a tensor"));
                let names = spellings.iter().map(|spelling| format!("`{above}.{expert}.{spelling}.weight`")).collect::<Vec<_>>();
                return Err(refused(
                    self.base.path(),
                    format!("{lacks} {} ({shape}), which the adapter changes", names.join(" or ")),
                ));
            };
            self.fits(&target, &[rows, factors.a.cols()])?;
            let b = factors.b.values()[at * rows * factors.b.cols()..][..rows * factors.b.cols()].to_vec();
            let part = Factors { b: HostMatrix::new((rows, factors.b.cols()), b)?, ..factors.clone() };
            self.change(&target)?.pieces.push(Piece {
                first_row: 0,
                factors: Cow::Owned(part),
                transposed: false,
                principal: None,
            });
        }
        Ok(())
    }
}

/// `Aₑ = A[e·r..(e+1)·r, :]`, `Bₑ = B[:, e::E]`
fn of_expert(Factors { a, b, scaling, dtype }: &Factors, experts: usize, expert: usize) -> Result<Factors> {
    let (r, k) = (a.rows() / experts, a.cols());
    let a = HostMatrix::new((r, k), a.values()[expert * r * k..][..r * k].to_vec())?;
    let columns = b.values().chunks(b.cols().max(1)).flat_map(|row| row.iter().skip(expert).step_by(experts).copied());
    Ok(Factors { a, b: HostMatrix::new((b.rows(), r), columns.collect())?, scaling: *scaling, dtype: *dtype })
}
