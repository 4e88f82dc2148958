//! Parses PTX text into statements, and these into kernels with resolved names.

use std::collections::HashMap;

use crate::decode::decode;
use crate::fault::{ParseError, error};
use crate::names::{Name, Names};
use crate::op::Instruction;

/// A PTX module: its kernels by name.
pub struct Module {
    kernels: HashMap<String, Kernel>,
}

/// A decoded kernel.
pub struct Kernel {
    pub(crate) name: String,
    pub(crate) code: Vec<Instruction>,
    pub(crate) registers: usize,
    /// Offset and size of each parameter.
    pub(crate) params: Vec<(usize, usize)>,
    pub(crate) static_shared: usize,
    /// Limits of threads in a block: the largest number, and the required number.
    pub(crate) max_threads: Option<u32>,
    pub(crate) required_threads: Option<u32>,
    /// Blocks of a cluster, if the kernel requires a number.
    pub(crate) cluster: Option<u32>,
    /// The limit of shared memory of a block, in bytes: that of the smallest GPU for the target.
    pub(crate) most_shared: usize,
}

/// A statement: text up to a semicolon, a colon or a brace, with its scope.
#[derive(Debug)]
struct Statement {
    line: usize,
    scope: usize,
    text: String,
    end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Semicolon,
    Label,
    Open,
}

impl Module {
    /// Parses PTX as written by nvcc and LLVM. Errors: text that cannot be parsed, and unknown instructions.
    pub fn parse(ptx: &str) -> Result<Self, ParseError> {
        let (statements, parents) = split(ptx)?;
        let mut names = Names::new(parents);
        let mut module_shared = Vec::new();
        let mut kernels = HashMap::new();
        let mut rest = statements.as_slice();
        while let Some((first, after)) = rest.split_first() {
            if first.end == End::Open {
                let body_len = after.iter().take_while(|statement| statement.scope != 0).count();
                let body = &after[..body_len];
                let kernel = Builder::new(&mut names, &shared_of(body, &module_shared)?)?.build(first, body)?;
                kernels.insert(kernel.name.clone(), kernel);
                rest = &after[body_len..];
            } else {
                if first.text.contains(".shared") {
                    module_shared.push(first);
                }
                rest = after;
            }
        }
        Ok(Self { kernels })
    }

    /// The kernel with this name.
    pub fn kernel(&self, name: &str) -> Option<&Kernel> {
        self.kernels.get(name)
    }

    /// The names of all kernels.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.kernels.keys().map(String::as_str)
    }
}

/// Splits the text at semicolons, labels and the braces of scopes, but not at braces of vectors. Also returns the parents of
/// scopes.
fn split(ptx: &str) -> Result<(Vec<Statement>, Vec<usize>), ParseError> {
    let (mut statements, mut parents) = (Vec::new(), vec![0]);
    let (mut scope, mut vector, mut start, mut text) = (0, 0, 0, String::new());
    for (line, code) in (1..).zip(ptx.lines().map(|line| line.split("//").next().unwrap_or_default())) {
        if [".version", ".target", ".address_size"].iter().any(|directive| code.starts_with(directive)) {
            continue;
        }
        for c in code.chars().chain(['\n']) {
            let end = match c {
                '{' if text.trim().is_empty() || text.starts_with('.') => End::Open,
                ';' => End::Semicolon,
                ':' if is_name(&text) => End::Label,
                '}' if vector == 0 && text.trim().is_empty() => {
                    scope = parents[scope];
                    continue;
                }
                _ => {
                    vector += i32::from(c == '{') - i32::from(c == '}');
                    if text.is_empty() {
                        start = line;
                    }
                    if !(text.is_empty() && c.is_whitespace()) {
                        text.push(c);
                    }
                    continue;
                }
            };
            let line = if text.is_empty() { line } else { start };
            let text = std::mem::take(&mut text);
            statements.push(Statement { line, scope, text: text.trim().to_owned(), end });
            if end == End::Open {
                parents.push(scope);
                scope = parents.len() - 1;
            }
        }
    }
    if text.is_empty() { Ok((statements, parents)) } else { Err(error(start, "the statement does not end")) }
}

/// True if a colon after `text` makes it a label; in `ld.global.L1::evict_last` it does not.
fn is_name(text: &str) -> bool {
    let rest = text.strip_prefix(|c: char| c.is_ascii_alphabetic() || "$_%".contains(c));
    rest.is_some_and(|rest| rest.chars().all(|c| c.is_ascii_alphanumeric() || "$_".contains(c)))
}

/// Bytes of a type such as `.b8` or `.f32`.
fn size_of(ty: &str, line: usize) -> Result<usize, ParseError> {
    let bits = ty.trim_start_matches(|c: char| !c.is_ascii_digit()).parse::<usize>();
    bits.map(|bits| bits / 8).map_err(|_| error(line, format!("unknown type `{ty}`")))
}

/// `.align 16 .b8 name[64]` → alignment, bytes (None: as many as the launch gives) and name.
fn variable(text: &str, line: usize) -> Result<(usize, Option<usize>, &str), ParseError> {
    let unreadable = || error(line, format!("cannot read `{text}`"));
    let mut words: Vec<&str> = text.split_whitespace().collect();
    if let Some(at) = words.iter().position(|&word| word == ".ptr") {
        words.drain(at..words.len() - 1); // `.ptr .global .align 1`: what the pointer points to
    }
    let [.., ty, declared] = words[..] else { return Err(unreadable()) };
    let size = size_of(ty, line)?;
    let align = words.iter().position(|&word| word == ".align").and_then(|at| words.get(at + 1)?.parse().ok());
    let (name, len) = declared.split_once('[').unwrap_or((declared, "1]"));
    let len = match len.trim_end_matches(']') {
        "" => None,
        len => Some(size * len.parse::<usize>().map_err(|_| unreadable())?),
    };
    Ok((align.unwrap_or(size), len, name))
}

/// Offsets of the variables in shared memory.
#[derive(Default)]
struct SharedLayout {
    len: usize,
    /// Scopes and names of dynamic shared memory, which is behind everything else.
    dynamic: Vec<(usize, String)>,
}

impl SharedLayout {
    fn declare(&mut self, names: &mut Names, statement: &Statement) -> Result<(), ParseError> {
        let (align, len, name) = variable(&statement.text, statement.line)?;
        match len {
            None => self.dynamic.push((statement.scope, name.to_owned())),
            Some(len) => {
                let offset = self.len.next_multiple_of(align);
                names.add(statement.scope, name, Name::Offset(offset as u64));
                self.len = offset + len;
            }
        }
        Ok(())
    }

    /// Places dynamic shared memory behind the variables, and returns the bytes of the variables.
    fn close(mut self, names: &mut Names) -> usize {
        if !self.dynamic.is_empty() {
            self.len = self.len.next_multiple_of(16);
        }
        for (scope, name) in self.dynamic {
            names.add(scope, &name, Name::Offset(self.len as u64));
        }
        self.len
    }
}

/// The module's shared variables that a body names: only these take room in a block.
fn shared_of<'s>(body: &[Statement], declared: &[&'s Statement]) -> Result<Vec<&'s Statement>, ParseError> {
    let mut used = Vec::new();
    for &statement in declared {
        let (.., name) = variable(&statement.text, statement.line)?;
        if body.iter().any(|statement| statement.text.contains(name)) {
            used.push(statement);
        }
    }
    Ok(used)
}

/// Builds a kernel from its statements.
struct Builder<'n> {
    names: &'n mut Names,
    shared: SharedLayout,
    registers: u32,
}

impl<'n> Builder<'n> {
    fn new(names: &'n mut Names, used: &[&Statement]) -> Result<Self, ParseError> {
        let mut shared = SharedLayout::default();
        for statement in used {
            shared.declare(names, statement)?; // again for each kernel, at its own offset
        }
        Ok(Self { names, shared, registers: 0 })
    }

    /// Declarations first, so that labels and registers are known when instructions are decoded.
    fn build(mut self, head: &Statement, body: &[Statement]) -> Result<Kernel, ParseError> {
        let (name, params) = self.head(head, body.first().map_or(0, |first| first.scope))?;
        let mut instructions = Vec::new();
        for statement in body {
            match statement.end {
                End::Open => {}
                End::Label => {
                    self.names.add(statement.scope, &statement.text, Name::Label(instructions.len() as u32));
                }
                End::Semicolon if statement.text.starts_with('.') => self.declare(statement)?,
                End::Semicolon if statement.text.is_empty() => {}
                End::Semicolon => instructions.push(statement),
            }
        }
        let static_shared = self.shared.close(self.names);
        let names = &*self.names;
        let code = instructions.iter().map(|s| decode(&s.text, s.line, |name| names.find(s.scope, name)));
        let is_hopper = body.iter().any(|statement| statement.text.starts_with("wgmma"));
        let most_shared = if is_hopper { 227 << 10 } else { 99 << 10 };
        let (code, registers) = (code.collect::<Result<_, _>>()?, self.registers as usize);
        Ok(Kernel {
            name,
            code,
            registers,
            params,
            static_shared,
            max_threads: number_after(&head.text, ".maxntid"),
            required_threads: number_after(&head.text, ".reqntid"),
            cluster: number_after(&head.text, ".reqnctapercluster"),
            most_shared,
        })
    }

    /// `.visible .entry name(.param .u64 name_param_0, ..)` → the name, and offset and size of each parameter.
    fn head(&mut self, head: &Statement, scope: usize) -> Result<(String, Vec<(usize, usize)>), ParseError> {
        let unreadable = || error(head.line, "cannot read this entry");
        let (_, after) = head.text.split_once(".entry").ok_or_else(unreadable)?;
        let (name, after) = after.split_once('(').ok_or_else(unreadable)?;
        let (list, _) = after.split_once(')').ok_or_else(unreadable)?;
        let (mut params, mut end) = (Vec::new(), 0usize);
        for declaration in list.split(',').filter(|declaration| !declaration.trim().is_empty()) {
            let (align, len, name) = variable(declaration, head.line)?;
            let (offset, len) = (end.next_multiple_of(align), len.ok_or_else(unreadable)?);
            self.names.add(scope, name, Name::Offset(offset as u64));
            params.push((offset, len));
            end = offset + len;
        }
        Ok((name.trim().to_owned(), params))
    }

    fn declare(&mut self, statement: &Statement) -> Result<(), ParseError> {
        let Statement { line, scope, text, .. } = statement;
        if text.starts_with(".shared") {
            return self.shared.declare(self.names, statement);
        }
        if text.starts_with(".pragma") {
            return Ok(());
        }
        let list = text.strip_prefix(".reg").and_then(|rest| rest.trim().split_once(char::is_whitespace));
        let (_, list) = list.ok_or_else(|| error(*line, format!("unknown declaration `{text}`")))?;
        for declared in list.split(',').map(str::trim) {
            match declared.split_once('<') {
                None => self.register(*scope, declared),
                Some((stem, count)) => {
                    let count = count.trim_end_matches('>').parse::<u32>().map_err(|_| error(*line, "how many registers?"))?;
                    (0..count).for_each(|i| self.register(*scope, &format!("{stem}{i}")));
                }
            }
        }
        Ok(())
    }

    fn register(&mut self, scope: usize, name: &str) {
        self.names.add(scope, name, Name::Register(self.registers));
        self.registers += 1;
    }
}

/// The first number of a directive such as `.maxntid 256, 1, 1`.
fn number_after(head: &str, directive: &str) -> Option<u32> {
    let (_, after) = head.split_once(directive)?;
    after.split([',', '\n']).next()?.trim().parse().ok()
}
