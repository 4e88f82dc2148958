//! Decodes a statement into an instruction.

use crate::fault::{ParseError, Space, error};
use crate::names::Name;
use crate::op::{Address, Arrivals, Half, Instruction, MAX_VECTOR, Op, Operand, Product, Shuffle, Side, Special};
use crate::scalar;

/// Reads the operands of a statement.
struct Reader<'s, F> {
    line: usize,
    opcode: &'s str,
    operands: Vec<&'s str>,
    find: F,
}

/// Decodes a statement; `find` resolves names.
pub(crate) fn decode(text: &str, line: usize, find: impl Fn(&str) -> Option<Name>) -> Result<Instruction, ParseError> {
    let (guard, text) = match text.strip_prefix('@') {
        None => (None, text),
        Some(rest) => {
            let (name, text) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
            (Some(name), text.trim())
        }
    };
    let (opcode, operands) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let reader = Reader { line, opcode, operands: list(operands), find };
    let guard = match guard {
        None => None,
        Some(name) => Some((reader.register(name.trim_start_matches('!'))?, !name.starts_with('!'))),
    };
    Ok(Instruction { line, guard, op: reader.op()? })
}

/// Splits at commas outside of brackets and braces.
fn list(text: &str) -> Vec<&str> {
    let mut depth = 0;
    let parts = text.split(|c| {
        depth += i32::from(c == '{' || c == '[') - i32::from(c == '}' || c == ']');
        c == ',' && depth == 0
    });
    parts.map(str::trim).filter(|part| !part.is_empty()).collect()
}

impl<F: Fn(&str) -> Option<Name>> Reader<'_, F> {
    fn fail<T>(&self, reason: impl Into<String>) -> Result<T, ParseError> {
        Err(error(self.line, reason))
    }

    fn text(&self, i: usize) -> Result<&str, ParseError> {
        self.operands.get(i).copied().ok_or_else(|| error(self.line, format!("`{}` lacks an operand", self.opcode)))
    }

    fn register(&self, name: &str) -> Result<u32, ParseError> {
        match (self.find)(name) {
            Some(Name::Register(register)) => Ok(register),
            _ => self.fail(format!("`{name}` is no register")),
        }
    }

    fn operand(&self, text: &str) -> Result<Operand, ParseError> {
        match (self.find)(text) {
            Some(Name::Register(register)) => return Ok(Operand::Register(register)),
            Some(Name::Offset(offset)) => return Ok(Operand::Constant(offset)),
            _ => {}
        }
        match special(text).or_else(|| constant(text).map(Operand::Constant)) {
            Some(operand) => Ok(operand),
            None => self.fail(format!("unknown operand `{text}`")),
        }
    }

    fn number(&self, i: usize) -> Result<usize, ParseError> {
        match self.operand(self.text(i)?)? {
            Operand::Constant(value) => Ok(value as usize),
            _ => self.fail("must be a number"),
        }
    }

    /// The parts of `{a, b}`, or a single operand.
    fn vector(&self, i: usize) -> Result<Vec<&str>, ParseError> {
        let text = self.text(i)?;
        Ok(text.strip_prefix('{').map_or(vec![text], |inner| list(inner.trim_end_matches('}'))))
    }

    fn registers(&self, i: usize) -> Result<Vec<u32>, ParseError> {
        self.vector(i)?.into_iter().map(|name| self.register(name)).collect()
    }

    fn values(&self, i: usize) -> Result<Vec<Operand>, ParseError> {
        self.vector(i)?.into_iter().map(|text| self.operand(text)).collect()
    }

    fn address(&self, i: usize) -> Result<Address, ParseError> {
        let inner = self.text(i)?.trim_start_matches('[').trim_end_matches(']');
        let (base, offset) = inner.split_once('+').unwrap_or((inner, "0"));
        match offset.trim().parse() {
            Ok(offset) => Ok(Address { base: self.operand(base.trim())?, offset }),
            Err(_) => self.fail(format!("unknown address `{inner}`")),
        }
    }

    fn op(&self) -> Result<Op, ParseError> {
        let words: Vec<&str> = self.opcode.split('.').collect();
        match words[..] {
            ["ret" | "exit", ..] => Ok(Op::Return),
            ["bra", ..] => match (self.find)(self.text(0)?) {
                Some(Name::Label(to)) => Ok(Op::Branch { to: to as usize }),
                _ => self.fail("unknown label"),
            },
            ["bar", "warp", "sync"] => Ok(Op::WarpBarrier { lanes: self.operand(self.text(0)?)? }),
            ["bar" | "barrier", "sync", ..] => self.barrier(),
            ["mbarrier", ..] => self.mbarrier(&words),
            ["fence", "mbarrier_init", ..] => Ok(Op::BarrierInitFence),
            ["fence", "proxy", "async", ..] => Ok(Op::ProxyFence),
            ["cp", "async", "bulk", ..] => self.bulk(&words),
            ["wgmma", ..] => self.wgmma(&words),
            ["barrier", "cluster", "arrive", ..] => Ok(Op::ArriveInCluster),
            ["barrier", "cluster", "wait", ..] => Ok(Op::WaitInCluster),
            ["griddepcontrol", "wait"] => Ok(Op::WaitForPreviousLaunch),
            ["griddepcontrol", "launch_dependents"] => Ok(Op::LaunchDependents),
            ["setmaxnreg", ..] => Ok(Op::ConvergedNoEffect),
            ["prefetch" | "prefetchu", ..] => Ok(Op::NoEffect),
            ["trap" | "brkpt"] => Ok(Op::Trap),
            ["elect", "sync"] => self.elect(),
            ["shfl", "sync", kind, "b32"] => self.shuffle(kind),
            ["mov", ty] if self.operands.iter().any(|text| text.starts_with('{')) => self.repack(ty),
            ["ld", ref flags @ .., ty] => self.load(flags, ty),
            ["st", ref flags @ .., ty] => {
                let (space, address, from) = (space(flags), self.address(0)?, self.values(1)?);
                Ok(Op::Store { space, address, from, width: self.width(ty)? })
            }
            ["cp", "async", "commit_group"] => Ok(Op::CommitCopies),
            ["cp", "async", "wait_all"] => Ok(Op::WaitCopies { pending: None }),
            ["cp", "async", "wait_group"] => Ok(Op::WaitCopies { pending: Some(self.number(0)?) }),
            ["cp", "async", "ca" | "cg", "shared", "global", ..] => self.copy_async(),
            ["ldmatrix", "sync", "aligned", ref flags @ .., "shared" | "shared::cta", "b16"] => {
                let (to, address) = (self.registers(0)?, self.address(1)?);
                Ok(Op::LoadMatrix { transposed: self.matrices(flags, to.len())?, to, address })
            }
            ["stmatrix", "sync", "aligned", ref flags @ .., "shared" | "shared::cta", "b16"] => {
                let (address, from) = (self.address(0)?, self.registers(1)?);
                Ok(Op::StoreMatrix { transposed: self.matrices(flags, from.len())?, address, from })
            }
            ["mma", "sync", "aligned", "m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"] => self.multiply(Half::BF16),
            ["mma", "sync", "aligned", "m16n8k16", "row", "col", "f32", "f16", "f16", "f32"] => self.multiply(Half::F16),
            _ => self.scalar(),
        }
    }

    fn scalar(&self) -> Result<Op, ParseError> {
        let Some(f) = scalar::function(self.opcode) else {
            return self.fail(format!("unknown instruction `{}`", self.opcode));
        };
        let mut from = [Operand::Constant(0); 4];
        if self.operands.len() != f.operands() + 1 {
            return self.fail(format!("`{}` takes {} operands", self.opcode, f.operands() + 1));
        }
        for (slot, text) in from.iter_mut().zip(&self.operands[1..]) {
            *slot = self.operand(text)?;
        }
        Ok(Op::Scalar { f, to: self.register(self.operands[0])?, from })
    }

    fn repack(&self, ty: &str) -> Result<Op, ParseError> {
        let bits = 8 * self.width(ty)? as u32;
        if self.operands[0].starts_with('{') {
            let names = self.vector(0)?;
            let to = names.iter().map(|&name| if name == "_" { Ok(None) } else { self.register(name).map(Some) });
            let (to, bits) = (to.collect::<Result<_, _>>()?, bits / names.len() as u32);
            Ok(Op::Unpack { to, from: self.operand(self.text(1)?)?, bits })
        } else {
            let parts = self.values(1)?;
            let bits = bits / parts.len() as u32;
            Ok(Op::Pack { to: self.register(self.operands[0])?, parts, bits })
        }
    }

    fn load(&self, flags: &[&str], ty: &str) -> Result<Op, ParseError> {
        let (space, to, address) = (space(flags), self.registers(0)?, self.address(1)?);
        if to.len() > MAX_VECTOR {
            return self.fail(format!("more than {MAX_VECTOR} registers"));
        }
        Ok(Op::Load { space, to, address, width: self.width(ty)?, signed: ty.starts_with('s') })
    }

    fn shuffle(&self, kind: &str) -> Result<Op, ParseError> {
        let kind = match kind {
            "up" => Shuffle::Up,
            "down" => Shuffle::Down,
            "bfly" => Shuffle::Xor,
            "idx" => Shuffle::Index,
            _ => return self.fail("unknown shuffle"),
        };
        let (to, inside) = match self.text(0)?.split_once('|') {
            None => (self.register(self.text(0)?)?, None),
            Some((to, inside)) => (self.register(to)?, Some(self.register(inside)?)),
        };
        let operand = |i| self.operand(self.text(i)?);
        Ok(Op::Shuffle { kind, to, inside, from: operand(1)?, by: operand(2)?, clamp: operand(3)?, lanes: operand(4)? })
    }

    /// `register|predicate`, or `_|predicate`
    fn elect(&self) -> Result<Op, ParseError> {
        let Some((to, chosen)) = self.text(0)?.split_once('|') else { return self.fail("must say whether a lane is chosen") };
        let to = if to == "_" { None } else { Some(self.register(to)?) };
        Ok(Op::Elect { to, chosen: self.register(chosen)?, lanes: self.operand(self.text(1)?)? })
    }

    /// True if the 8×8 matrices are transposed.
    fn matrices(&self, flags: &[&str], registers: usize) -> Result<bool, ParseError> {
        let known = |&flag: &&str| ["m8n8", "trans"].contains(&flag) || flag == format!("x{registers}");
        let shaped = flags.contains(&"m8n8") && flags.iter().any(|flag| flag.starts_with('x'));
        if !shaped || ![1, 2, 4].contains(&registers) || !flags.iter().all(known) {
            return self.fail(format!("`{}` with {registers} registers is not known here", self.opcode));
        }
        Ok(flags.contains(&"trans"))
    }

    fn copy_async(&self) -> Result<Op, ParseError> {
        let filled = match self.operands.get(3) {
            None => None,
            Some(text) => Some(self.operand(text)?),
        };
        Ok(Op::CopyAsync { to: self.address(0)?, from: self.address(1)?, width: self.number(2)?, filled })
    }

    fn multiply(&self, half: Half) -> Result<Op, ParseError> {
        let (d, a, b, c) = (self.registers(0)?, self.registers(1)?, self.registers(2)?, self.values(3)?);
        match (d.len(), a.len(), b.len(), c.len()) {
            (4, 4, 2, 4) => Ok(Op::Multiply { half, d, a, b, c }),
            _ => self.fail("fragments of this product have 4, 4, 2 and 4 registers"),
        }
    }

    fn barrier(&self) -> Result<Op, ParseError> {
        let threads = self.operands.get(1).map(|text| self.operand(text)).transpose()?;
        Ok(Op::Barrier { number: self.operand(self.text(0)?)?, threads })
    }

    fn mbarrier(&self, words: &[&str]) -> Result<Op, ParseError> {
        let operand = |i| self.operand(self.text(i)?);
        match words[1..] {
            ["init", ..] => Ok(Op::InitBarrier { barrier: self.address(0)?, count: operand(1)? }),
            ["inval", ..] => Ok(Op::InvalidateBarrier { barrier: self.address(0)? }),
            ["arrive", "expect_tx", ..] => self.arrive(Arrivals::Expecting(operand(2)?)),
            ["arrive", "release" | "shared" | "shared::cta" | "shared::cluster" | "b64", ..] => {
                let count = self.operands.get(2).map_or(Ok(Operand::Constant(1)), |text| self.operand(text));
                self.arrive(Arrivals::Count(count?))
            }
            ["try_wait", "parity", ..] => {
                Ok(Op::WaitPhase { to: self.register(self.text(0)?)?, barrier: self.address(1)?, parity: operand(2)? })
            }
            _ => self.fail(format!("unknown instruction `{}`", self.opcode)),
        }
    }

    /// The state that an arrival returns is not modelled: waiting is by parity.
    fn arrive(&self, by: Arrivals) -> Result<Op, ParseError> {
        match self.text(0)? {
            "_" => Ok(Op::Arrive { barrier: self.address(1)?, by }),
            state => self.fail(format!("`{state}` would hold the state of a phase, which is not known here")),
        }
    }

    fn bulk(&self, words: &[&str]) -> Result<Op, ParseError> {
        // A cache hint, the last operand, has no effect. Tiled is the default of tensor copies.
        let words: Vec<_> = words[3..].iter().copied().filter(|&word| word != "tile" && word != "L2::cache_hint").collect();
        match words[..] {
            ["tensor", rank, "shared::cluster" | "shared::cta", "global", "mbarrier::complete_tx::bytes", ref flags @ ..] => {
                let (map, corner) = self.corner(1, rank)?;
                let blocks = match flags {
                    [] => None,
                    ["multicast::cluster"] => Some(self.operand(self.text(3)?)?),
                    _ => return self.fail(format!("unknown instruction `{}`", self.opcode)),
                };
                Ok(Op::TmaLoad { to: self.address(0)?, map, corner, barrier: self.address(2)?, blocks })
            }
            ["tensor", rank, "global", "shared::cta", "bulk_group"] => {
                let (map, corner) = self.corner(0, rank)?;
                Ok(Op::TmaStore { map, corner, from: self.address(1)? })
            }
            ["commit_group"] => Ok(Op::TmaStoreCommit),
            ["wait_group", ..] => Ok(Op::TmaStoreWait { pending: self.number(0)? }),
            _ => self.fail(format!("unknown instruction `{}`", self.opcode)),
        }
    }

    /// `[map, {col, row}]`, with as many coordinates as `2d` says.
    fn corner(&self, i: usize, rank: &str) -> Result<(Operand, Vec<Operand>), ParseError> {
        let inner = list(self.text(i)?.trim_start_matches('[').trim_end_matches(']'));
        let [map, corner] = inner[..] else { return self.fail("unknown place in a tensor") };
        let corner = list(corner.trim_start_matches('{').trim_end_matches('}'));
        if rank != format!("{}d", corner.len()) {
            return self.fail(format!("{} coordinates of a tensor that is {rank}", corner.len()));
        }
        Ok((self.operand(map)?, corner.into_iter().map(|text| self.operand(text)).collect::<Result<_, _>>()?))
    }

    fn wgmma(&self, words: &[&str]) -> Result<Op, ParseError> {
        let (half, cols) = match words[1..] {
            ["fence", ..] => return Ok(Op::WgmmaFence),
            ["commit_group", ..] => return Ok(Op::WgmmaCommit),
            ["wait_group", ..] => return Ok(Op::WgmmaWait { pending: self.number(0)? }),
            ["mma_async", "sync", "aligned", shape, "f32", "bf16", "bf16"] => (Some(Half::BF16), columns(shape, "k16")),
            ["mma_async", "sync", "aligned", shape, "f32", "f16", "f16"] => (Some(Half::F16), columns(shape, "k16")),
            ["mma_async", "sync", "aligned", shape, "f32", "tf32", "tf32"] => (None, columns(shape, "k8")),
            _ => (None, None),
        };
        let Some(cols) = cols else { return self.fail(format!("unknown instruction `{}`", self.opcode)) };
        let (d, lhs) = (self.registers(0)?, self.registers(1)?);
        let in_registers = self.text(1)?.starts_with('{');
        let adds = self.operand(self.text(3)?)?;
        let flags: Vec<_> = (4..self.operands.len()).map(|i| self.number(i)).collect::<Result<_, _>>()?;
        // Neither side may be negated; 16-bit elements in shared memory have flags for transposed sides.
        let (lhs_along, rhs_along) = match (half, in_registers, &flags[..]) {
            (Some(_), false, &[1, 1, lhs @ (0 | 1), rhs @ (0 | 1)]) => (lhs == 1, rhs == 1),
            (Some(_), true, &[1, 1, rhs @ (0 | 1)]) => (false, rhs == 1),
            (None, _, [1, 1]) => (false, false),
            _ => return self.fail("a product of a kind that is not known here"),
        };
        if d.len() != cols / 2 || lhs.len() != if in_registers { 4 } else { 1 } {
            return self.fail("fragments of this product have other numbers of registers");
        }
        let lhs = if in_registers { Side::Registers(lhs) } else { Side::Shared(lhs[0]) };
        let rhs = self.register(self.text(2)?)?;
        Ok(Op::Product(Product { half, cols, d, lhs, rhs, lhs_along, rhs_along, adds }))
    }

    /// The size of a type in bytes.
    fn width(&self, ty: &str) -> Result<usize, ParseError> {
        match ty.trim_start_matches(char::is_alphabetic) {
            "8" => Ok(1),
            "16" => Ok(2),
            "32" => Ok(4),
            "64" => Ok(8),
            _ => self.fail(format!("unknown type `{ty}`")),
        }
    }
}

/// The memory space of an access; `None`: generic, decided by the address.
fn space(flags: &[&str]) -> Option<Space> {
    flags.iter().find_map(|&flag| match flag {
        "param" => Some(Space::Param),
        "global" => Some(Space::Global),
        "shared" | "shared::cta" => Some(Space::Shared),
        _ => None,
    })
}

/// The number in the middle of `m64n256k16`.
fn columns(shape: &str, depth: &str) -> Option<usize> {
    shape.strip_prefix("m64n")?.strip_suffix(depth)?.parse().ok()
}

/// Blocks of threads, and clusters of blocks, have x only.
fn special(text: &str) -> Option<Operand> {
    Some(Operand::Special(match text {
        "%tid.x" => Special::Thread,
        "%ntid.x" => Special::Threads,
        "%tid.y" | "%tid.z" | "%cluster_ctaid.y" | "%cluster_ctaid.z" => return Some(Operand::Constant(0)),
        "%ntid.y" | "%ntid.z" | "%cluster_nctaid.y" | "%cluster_nctaid.z" => return Some(Operand::Constant(1)),
        "%ctaid.x" => Special::Block(0),
        "%ctaid.y" => Special::Block(1),
        "%ctaid.z" => Special::Block(2),
        "%nctaid.x" => Special::Blocks(0),
        "%nctaid.y" => Special::Blocks(1),
        "%nctaid.z" => Special::Blocks(2),
        "%laneid" => Special::Lane,
        "%cluster_ctarank" | "%cluster_ctaid.x" => Special::Rank,
        "%cluster_nctarank" | "%cluster_nctaid.x" => Special::Ranks,
        _ => return None,
    }))
}

/// `12`, `-12`, `0x1f`, and floats as their bits: `0f3F800000`, `0d3FF0000000000000`.
fn constant(text: &str) -> Option<u64> {
    for prefix in ["0x", "0f", "0d", "0F", "0D"] {
        if let Some(digits) = text.strip_prefix(prefix) {
            return u64::from_str_radix(digits, 16).ok();
        }
    }
    text.parse::<i64>().map(|value| value as u64).or_else(|_| text.parse::<u64>()).ok()
}
