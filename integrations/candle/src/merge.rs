//! `W += scale·B·A` in candle's own memory, and back to the bit.

use candle_core::{Result, Tensor};
use lowrank::nn::Residue;
use lowrank::op::{Factor, LoraMerge, Rounding};

use crate::lend::{Elem, Lent, by_dtype, matrix, matrix_mut, wrapped, write};

/// An update of a weight: `scale·B·A`.
#[derive(Debug)]
struct Product {
    a: Vec<f32>,
    b: Vec<f32>,
    shape: (usize, usize),
    scale: f32,
}

impl Product {
    fn add<E: Elem>(&self, w: &mut [E], sign: f32) -> Result<()> {
        let ((n, k), r) = (self.shape, self.a.len() / self.shape.1.max(1));
        LoraMerge {
            a: Factor::F32(matrix(&self.a, (r, k))?),
            b: Factor::F32(matrix(&self.b, (n, r))?),
            scale: sign * self.scale,
            rounding: Rounding::Nearest,
            w: matrix_mut(w, (n, k))?,
        }
        .run(E::cpu()?)
        .map_err(wrapped)
    }
}

/// What takes a merged update out of a weight again.
pub(crate) struct Undo(Box<Way>);

type Way = dyn Fn(&Tensor) -> Result<()> + Send + Sync;

impl std::fmt::Debug for Undo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Undo")
    }
}

impl Undo {
    /// The weight is what it was before, bit for bit.
    pub(crate) fn run(&self, w: &Tensor) -> Result<()> {
        (self.0)(w)
    }
}

/// `W += scale·B·A`, `W n×k` of any type, `A r×k` and `B n×r` in `f32`. All tensors that share the memory of `W` see it.
///
/// Errors: for shapes that do not fit and numbers that would not be finite. `W` is as it was then.
pub(crate) fn merge(w: &Tensor, a: &Tensor, b: &Tensor, scale: f32) -> Result<Undo> {
    let (la, lb) = (Lent::new(a), Lent::new(b));
    let product = Product { a: la.slice::<f32>()?.to_vec(), b: lb.slice::<f32>()?.to_vec(), shape: w.dims2()?, scale };
    by_dtype!(w.dtype(), E => {
        let residue = write(w, |w: &mut [E]| add::<E>(w, &product))?;
        Ok(Undo(Box::new(move |w| {
            write(w, |w: &mut [E]| {
                product.add(w, -1.0)?;
                residue.restore(w);
                Ok(())
            })
        })))
    })
}

/// Adds the product and finds what taking it away would not restore.
fn add<E: Elem>(w: &mut [E], product: &Product) -> Result<Residue<E>> {
    let original = w.to_vec();
    let mut there_and_back = || {
        product.add(w, 1.0)?;
        let merged = w.to_vec();
        if !merged.iter().all(|x| x.to_f32().is_finite()) {
            candle_core::bail!("the merged weight is not finite");
        }
        product.add(w, -1.0)?;
        let residue = Residue::between(&original, w);
        w.copy_from_slice(&merged);
        Ok(residue)
    };
    let residue = there_and_back();
    if residue.is_err() {
        w.copy_from_slice(&original);
    }
    residue
}
