//! Arguments of a launch, and their bytes in the kernel's parameters.

use crate::memory::Global;
use crate::parse::Kernel;
use crate::tensor::TensorMap;

/// An argument of a launch.
pub enum Arg<'m> {
    /// A 32-bit number.
    U32(u32),
    /// A 64-bit number.
    U64(u64),
    /// A float.
    F32(f32),
    /// A null pointer.
    Null,
    /// Memory that the kernel may read.
    Read(&'m Global),
    /// Memory that the kernel may read, with a pointer to the byte at this offset.
    ReadAt(&'m Global, u64),
    /// Memory that the kernel may read and write.
    Write(&'m mut Global),
    /// Memory that the kernel may read and write, with a pointer to the byte at this offset.
    WriteAt(&'m mut Global, u64),
    /// A tensor map for TMA loads.
    ReadTiles(&'m Global, TensorMap),
    /// A tensor map for TMA stores.
    WriteTiles(&'m mut Global, TensorMap),
    /// A structure of this size in bytes, passed by value: its fields by offset, none of them a structure; zeros between.
    Struct(usize, Vec<(usize, Arg<'m>)>),
}

/// Address space of an argument: argument `i`, from 1, fields counted one by one, starts at address `i · SPAN`.
pub(crate) const SPAN: u64 = 1 << 40;

/// The arguments of a launch, fields of structures one by one, each with its offset in the parameters.
pub(crate) struct Args<'l, 'm> {
    flat: Vec<(usize, &'l mut Arg<'m>)>,
    pub(crate) bytes: Vec<u8>,
}

impl<'l, 'm> Args<'l, 'm> {
    /// Lays out the arguments for the kernel. Errors: the reason why they do not fit.
    pub(crate) fn new(kernel: &Kernel, args: &'l mut [Arg<'m>]) -> Result<Self, String> {
        let (want, got) = (kernel.params.len(), args.len());
        if want != got {
            return Err(format!("{got} arguments where the kernel takes {want}"));
        }
        let mut all = Self { flat: Vec::new(), bytes: Vec::new() };
        for (i, (arg, &(offset, size))) in args.iter_mut().zip(&kernel.params).enumerate() {
            let end = all.add(offset, arg)?;
            if end != offset + size {
                return Err(format!("argument {i} has {} bytes where the kernel takes {size}", end - offset));
            }
        }
        Ok(all)
    }

    /// Adds an argument, or the fields of one. Returns the end of its bytes.
    fn add(&mut self, offset: usize, arg: &'l mut Arg<'m>) -> Result<usize, String> {
        if let Arg::Struct(size, fields) = arg {
            let end = offset + *size;
            for (at, field) in fields {
                let nested = matches!(field, Arg::Struct(..));
                if nested || *at + offset < self.bytes.len() || self.add(offset + *at, field)? > end {
                    return Err(format!("a structure of {size} bytes has fields that overlap, stand outside, or have fields"));
                }
            }
            self.bytes.resize(end, 0);
            return Ok(end);
        }
        let value = self.value(arg)?;
        self.bytes.resize(offset, 0);
        self.bytes.extend(value);
        if let Arg::Write(global) | Arg::WriteAt(global, _) | Arg::WriteTiles(global, _) = arg {
            global.watch();
        }
        self.flat.push((offset, arg));
        Ok(self.bytes.len())
    }

    fn value(&self, arg: &Arg<'m>) -> Result<Vec<u8>, String> {
        Ok(match arg {
            Arg::U32(value) => value.to_le_bytes().to_vec(),
            Arg::F32(value) => value.to_le_bytes().to_vec(),
            Arg::U64(value) => value.to_le_bytes().to_vec(),
            Arg::Null => 0u64.to_le_bytes().to_vec(),
            Arg::ReadTiles(global, map) => map.encode(global.bytes().len())?,
            Arg::WriteTiles(global, map) => map.encode(global.bytes().len())?,
            Arg::Read(_) | Arg::Write(_) => self.next().to_le_bytes().to_vec(),
            Arg::ReadAt(_, offset) | Arg::WriteAt(_, offset) => (self.next() + offset).to_le_bytes().to_vec(),
            Arg::Struct(..) => return Err("a structure in a structure".into()),
        })
    }

    /// The address of the next argument in memory.
    fn next(&self) -> u64 {
        (self.flat.len() as u64 + 1) * SPAN
    }

    /// The argument that an address belongs to.
    pub(crate) fn at_address(&mut self, at: u64) -> Option<&mut Arg<'m>> {
        let number = (at / SPAN).checked_sub(1)?;
        self.flat.get_mut(number as usize).map(|(_, arg)| &mut **arg)
    }

    /// The number of the argument at an offset of the parameters, and its tensor map.
    pub(crate) fn map_at(&self, offset: usize) -> Option<(usize, &TensorMap)> {
        let number = self.flat.iter().position(|&(at, _)| at == offset)?;
        Some((number, self.map(number)?))
    }

    /// The tensor map of an argument.
    pub(crate) fn map(&self, number: usize) -> Option<&TensorMap> {
        match &*self.flat[number].1 {
            Arg::ReadTiles(_, map) | Arg::WriteTiles(_, map) => Some(map),
            _ => None,
        }
    }

    pub(crate) fn get_mut(&mut self, number: usize) -> &mut Arg<'m> {
        self.flat[number].1
    }

    pub(crate) fn get(&self, number: usize) -> &Arg<'m> {
        self.flat[number].1
    }
}
