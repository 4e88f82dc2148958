//! The backward pass of one node: the derivative of every operation, as one match.

use super::custom::BoxedDerivative;
use super::gradients::{Gradient, Gradients};
use super::{LoraParams, Node, Op, Param, Var, copy};
use crate::backend::Backend;
use crate::error::Result;
use crate::op::{Accumulate, DropoutForward, LinearBackward, LoraBackward, MagnitudeBackward, ReluBackward};
use crate::tensor::Tensor;

/// Adds to the gradients of the operands of `y`'s operation, computed from `dy`. The methods of the tape have checked that each `Var`
/// in a node is of this tape.
pub(super) fn node<B: Backend>(
    backend: &B,
    (nodes, customs): (&[Node<'_, B>], &[BoxedDerivative<'_, B>]),
    y: Var,
    dy: Tensor<B>,
    gradients: &mut Gradients<B>,
) -> Result<()> {
    let values = &gradients.values;
    let new_dx = |x: Var| {
        let needs_grad = nodes[x.index].needs_grad;
        needs_grad.then(|| Tensor::unwritten(backend, values[x.index].shape())).transpose()
    };
    match &nodes[y.index].op {
        Op::Input => {}
        Op::Relu { x } => {
            let mut dx = Tensor::unwritten(backend, dy.shape())?;
            ReluBackward { y: values[y.index].view(), dy: dy.view(), dx: dx.view_mut() }.run(backend)?;
            gradients.add_to_value(backend, *x, dx)?;
        }
        Op::Linear { x, w, bias } => {
            let (mut dx, mut dbias) = (new_dx(*x)?, new_grad(backend, *bias)?);
            let (dx_, dbias_) = (dx.as_mut(), dbias.as_mut());
            let backward = LinearBackward {
                x: Some(values[x.index].view()),
                w: Some((&w.tensor).into()),
                dy: dy.view(),
                dx: dx_.map(Into::into),
                dw: None,
                dbias: dbias_.map(Tensor::view_mut),
            };
            backward.run(backend)?;
            gradients.add_to_parameter(backend, *bias, dbias.map(Gradient::Dense))?;
            gradients.add_to_parameter(backend, Some(w), w.trainable.then_some(Gradient::Factored { dy, x: *x }))?;
            dx.map_or(Ok(()), |dx| gradients.add_to_value(backend, *x, dx))?;
        }
        Op::Lora { x, layer: LoraParams { w, bias, a, b, lora_bias, scale, dropout }, h } => {
            let mut dx = new_dx(*x)?;
            let mut dbias = new_grad(backend, bias.filter(|bias| bias.trainable).or(*lora_bias))?;
            let mut da = Tensor::unwritten(backend, a.tensor.shape())?;
            let mut db = Tensor::unwritten(backend, b.tensor.shape())?;
            let backward = LoraBackward {
                x: values[x.index].view(),
                w: w.map(|w| (&w.tensor).into()),
                a: (&a.tensor).into(),
                b: (&b.tensor).into(),
                h: h.view(),
                dy: dy.view(),
                scale: *scale,
                dropout: *dropout,
                da: da.view_mut(),
                db: db.view_mut(),
                dbias: dbias.as_mut().map(Tensor::view_mut),
                dx: dx.as_mut().map(Into::into),
            };
            backward.run(backend)?;
            if let (Some(x), Some(lora_bias)) = (&dbias, lora_bias.filter(|lora_bias| lora_bias.trainable)) {
                let mut y = Tensor::zeros(backend, x.shape())?;
                Accumulate { x: x.view(), scale: *scale, y: y.view_mut() }.run(backend)?;
                gradients.add_to_parameter(backend, Some(lora_bias), Some(Gradient::Dense(y)))?;
            }
            gradients.add_to_parameter(backend, bias.filter(|bias| bias.trainable), dbias.map(Gradient::Dense))?;
            gradients.add_to_parameter(backend, Some(a), a.trainable.then_some(Gradient::Dense(da)))?;
            gradients.add_to_parameter(backend, Some(b), b.trainable.then_some(Gradient::Dense(db)))?;
            gradients.add_to_parameter(backend, *w, w.filter(|w| w.trainable).map(|_| Gradient::Factored { dy, x: *x }))?;
            dx.map_or(Ok(()), |dx| gradients.add_to_value(backend, *x, dx))?;
        }
        Op::Magnitude { z, magnitude, norm, bias } => {
            let (mut dz, mut dmagnitude) = (new_dx(*z)?, new_grad(backend, Some(magnitude))?);
            let mut dbias = new_grad(backend, *bias)?;
            let backward = MagnitudeBackward {
                z: values[z.index].view(),
                magnitude: magnitude.tensor.view(),
                norm: norm.view(),
                dy: dy.view(),
                dz: dz.as_mut().map(Tensor::view_mut),
                dmagnitude: dmagnitude.as_mut().map(Tensor::view_mut),
                dbias: dbias.as_mut().map(Tensor::view_mut),
            };
            backward.run(backend)?;
            gradients.add_to_parameter(backend, Some(magnitude), dmagnitude.map(Gradient::Dense))?;
            gradients.add_to_parameter(backend, *bias, dbias.map(Gradient::Dense))?;
            dz.map_or(Ok(()), |dz| gradients.add_to_value(backend, *z, dz))?;
        }
        Op::Dropout { x, dropout } => {
            let mut dx = Tensor::unwritten(backend, dy.shape())?;
            DropoutForward { x: dy.view(), dropout: *dropout, y: dx.view_mut() }.run(backend)?;
            gradients.add_to_value(backend, *x, dx)?;
        }
        Op::Custom { index } => customs[*index].backward(backend, nodes, y, &dy, gradients)?,
        Op::Sum { x, y, negate } => {
            if nodes[y.index].needs_grad {
                gradients.add_to_value(backend, *y, copy(backend, &dy, *negate)?)?;
            }
            if nodes[x.index].needs_grad {
                gradients.add_to_value(backend, *x, dy)?;
            }
        }
    }
    Ok(())
}

/// A tensor for the gradient of a parameter; `None` without a parameter, or for a frozen one.
fn new_grad<B: Backend>(backend: &B, param: Option<&Param<B>>) -> Result<Option<Tensor<B, f32>>> {
    let trainable = param.filter(|param| param.trainable);
    trainable.map(|param| Tensor::unwritten(backend, param.tensor.shape())).transpose()
}
