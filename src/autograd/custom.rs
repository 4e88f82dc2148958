//! Custom operations: the caller computes a value and supplies its derivative.

use super::gradients::{Gradient, Gradients};
use super::{Node, Op, Param, Tape, Var};
use crate::backend::Backend;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The arguments of the derivative of a [custom](Tape::custom) operation.
#[derive(Debug)]
pub struct Backward<'t, B: Backend, const N: usize> {
    /// The backend that holds the tensors.
    pub backend: &'t B,
    /// The inputs of the operation.
    pub inputs: [&'t Tensor<B>; N],
    /// True for each input that needs a gradient. A gradient for any other input is dropped, so it need not be computed.
    pub wanted: [bool; N],
    /// The output of the operation.
    pub y: &'t Tensor<B>,
    /// The gradient of the loss with respect to `y`, of its shape.
    pub dy: &'t Tensor<B>,
}

/// The gradients that the derivative returns: one for each input, and one in `f32` for each parameter. `None` means zero.
pub type CustomGradients<B, const N: usize, const P: usize> = ([Option<Tensor<B>>; N], [Option<Tensor<B, f32>>; P]);

impl<'m, B: Backend> Tape<'m, B> {
    /// Puts `y` on the tape: a value that the caller computed from `inputs` and `params`, together with its derivative.
    ///
    /// `backward` computes the gradients of the inputs and of the parameters, in this order and of their shapes, from the gradient of
    /// `y`. It captures whatever else it needs. Errors call the operation `name`.
    ///
    /// ```
    /// use lowrank::autograd::{Backward, Tape};
    /// use lowrank::{Cpu, Tensor};
    ///
    /// let cpu = Cpu::<f32>::new()?;
    /// let mut tape = Tape::new(&cpu);
    /// let x = tape.input(Tensor::from_slice(&cpu, (1, 3), &[1.0, 2.0, 3.0])?);
    ///
    /// // y = x², dx = 2·x·dy
    /// let squares: Vec<f32> = tape.value(x)?.to_vec(&cpu)?.iter().map(|x| x * x).collect();
    /// let squares = Tensor::from_slice(&cpu, (1, 3), &squares)?;
    /// let y = tape.custom("square", [x], [], squares, |Backward { backend, inputs: [x], dy, .. }| {
    ///     let (xs, dy) = (x.to_vec(backend)?, dy.to_vec(backend)?);
    ///     let dx: Vec<f32> = xs.iter().zip(dy).map(|(x, dy)| 2.0 * x * dy).collect();
    ///     Ok(([Some(Tensor::from_slice(backend, x.shape(), &dx)?)], []))
    /// })?;
    /// assert_eq!(tape.value(y)?.to_vec(&cpu)?, [1.0, 4.0, 9.0]);
    /// # Ok::<(), lowrank::Error>(())
    /// ```
    ///
    /// Errors: [`Error::Value`] for an input of another tape. [`Tape::backward`] returns the errors of the derivative, and
    /// [`Error::Value`] for a gradient of the wrong shape.
    pub fn custom<const N: usize, const P: usize>(
        &mut self,
        name: &'static str,
        inputs: [Var; N],
        params: [&'m Param<B>; P],
        y: Tensor<B>,
        backward: impl Fn(Backward<'_, B, N>) -> Result<CustomGradients<B, N, P>> + 'm,
    ) -> Result<Var> {
        inputs.iter().try_for_each(|&input| self.value(input).map(|_| ()))?;
        let needs_grad = inputs.iter().any(|&input| self.needs_grad(input)) || params.iter().any(|param| param.trainable);
        self.customs.push(Box::new(Custom { name, inputs, params, backward }));
        Ok(self.push(Op::Custom { index: self.customs.len() - 1 }, needs_grad, y))
    }
}

/// The derivative of a custom operation, as a tape holds it.
pub(super) type BoxedDerivative<'m, B> = Box<dyn Derivative<B> + 'm>;

/// The derivative of a custom operation, for any number of inputs and parameters.
pub(super) trait Derivative<B: Backend> {
    /// Adds to the gradients of the inputs and parameters, computed from `dy`. All values are of the same tape.
    fn backward(&self, backend: &B, nodes: &[Node<'_, B>], y: Var, dy: &Tensor<B>, gradients: &mut Gradients<B>) -> Result<()>;
}

struct Custom<'m, B: Backend, F, const N: usize, const P: usize> {
    name: &'static str,
    inputs: [Var; N],
    params: [&'m Param<B>; P],
    backward: F,
}

impl<B: Backend, F, const N: usize, const P: usize> Derivative<B> for Custom<'_, B, F, N, P>
where
    F: Fn(Backward<'_, B, N>) -> Result<CustomGradients<B, N, P>>,
{
    fn backward(&self, backend: &B, nodes: &[Node<'_, B>], y: Var, dy: &Tensor<B>, gradients: &mut Gradients<B>) -> Result<()> {
        let values = &gradients.values;
        let inputs = self.inputs.map(|input| &values[input.index]);
        let wanted = self.inputs.map(|input| nodes[input.index].needs_grad);
        let y = &values[y.index];
        let (of_inputs, of_params) = (self.backward)(Backward { backend, inputs, wanted, y, dy })?;
        for (i, (input, gradient)) in self.inputs.into_iter().zip(of_inputs).enumerate() {
            let Some(gradient) = gradient.filter(|_| wanted[i]) else { continue };
            self.fits(("input", i), &gradient, &gradients.values[input.index])?;
            gradients.add_to_value(backend, input, gradient)?;
        }
        for (i, (param, gradient)) in self.params.into_iter().zip(of_params).enumerate() {
            let Some(gradient) = gradient.filter(|_| param.trainable) else { continue };
            self.fits(("parameter", i), &gradient, &param.tensor)?;
            gradients.add_to_parameter(backend, Some(param), Some(Gradient::Dense(gradient)))?;
        }
        Ok(())
    }
}

impl<B: Backend, F, const N: usize, const P: usize> Custom<'_, B, F, N, P> {
    /// Errors: [`Error::Value`] unless the gradient has the shape of its input or parameter.
    fn fits<T: Element>(&self, (what, i): (&str, usize), gradient: &Tensor<B, T>, of: &Tensor<B>) -> Result<()> {
        let (got, want) = (gradient.shape(), of.shape());
        if got == want {
            return Ok(());
        }
        let got = format!("{got} for {what} {i}");
        Err(Error::Value { verb: self.name, name: "gradient", got, want: format!("{want}, the shape of its value").into() })
    }
}
