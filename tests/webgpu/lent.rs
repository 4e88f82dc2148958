//! Buffers of the caller as operands: they are not copied, elements outside a matrix are not changed, and unsuitable ones are refused.

use lowrank::op::{Add, LinearForward, LoraBackward, LoraForward, Output};
use lowrank::{Backend, Element, Error, Float, Tensor, WebGpu, f16};

use super::support::data::{Dims, random, up};
use super::support::oracle::{Lora, Mat};
use super::{shared_f16, shared_f32};

const STORAGE: wgpu::BufferUsages = wgpu::BufferUsages::STORAGE;
/// The value of elements between the matrices.
const BETWEEN: f32 = 77.0;

/// A buffer of the caller's with these elements.
fn buffer<E: Float, T: Element>(gpu: &WebGpu<E>, elements: &[T], usage: wgpu::BufferUsages) -> wgpu::Buffer {
    let bytes: &[u8] = bytemuck::cast_slice(elements);
    let size = (bytes.len() as u64).next_multiple_of(4);
    let descriptor = wgpu::BufferDescriptor { label: Some("the caller's"), size, usage, mapped_at_creation: true };
    let buffer = gpu.wgpu_device().create_buffer(&descriptor);
    buffer.slice(..).get_mapped_range_mut().unwrap().slice(..bytes.len()).copy_from_slice(bytes);
    buffer.unmap();
    buffer
}

/// Reads a buffer with the usage `COPY_SRC`, without this crate.
fn contents<E: Float, T: Element>(gpu: &WebGpu<E>, buffer: &wgpu::Buffer) -> Vec<T> {
    gpu.synchronize().unwrap();
    let (device, queue) = (gpu.wgpu_device(), gpu.wgpu_queue());
    let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
    let descriptor = wgpu::BufferDescriptor { label: None, size: buffer.size(), usage, mapped_at_creation: false };
    let staging = device.create_buffer(&descriptor);
    let mut encoder = device.create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, buffer.size());
    queue.submit([encoder.finish()]);
    staging.slice(..).map_async(wgpu::MapMode::Read, |mapped| mapped.unwrap());
    device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    let bytes = staging.slice(..).get_mapped_range().unwrap().to_vec();
    bytemuck::pod_collect_to_vec(&bytes)
}

/// A matrix with columns before and behind it, and a few elements before all of it, so that nothing is aligned.
struct Wide<T> {
    elements: Vec<T>,
    shape: (usize, usize),
    offset: usize,
    stride: usize,
}

impl<T: Float> Wide<T> {
    fn new((rows, cols): (usize, usize), matrix: Option<&[T]>) -> Self {
        let (offset, stride) = (5, cols + 3);
        let mut elements = vec![T::from_f32(BETWEEN); offset + rows * stride + 1];
        for (row, from) in matrix.map_or(vec![], |m| m.chunks(cols.max(1)).collect()).into_iter().enumerate() {
            elements[offset + row * stride..][..cols].copy_from_slice(from);
        }
        Self { elements, shape: (rows, cols), offset, stride }
    }

    /// The matrix in `elements`; everything else must be as it was.
    fn matrix(&self, elements: &[T]) -> Vec<T> {
        let (rows, cols) = self.shape;
        let mut inside = vec![];
        for (e, &element) in elements.iter().enumerate().take(self.elements.len()) {
            let place = e.checked_sub(self.offset).map(|at| (at / self.stride, at % self.stride));
            match place {
                Some((row, col)) if row < rows && col < cols => inside.push(element),
                _ => assert_eq!(element.to_f32(), BETWEEN, "element {e} lies beside the matrix"),
            }
        }
        inside
    }
}

/// `y` and `dx`, in tensors, of a layer without a mask.
fn in_tensors<E: Float>(gpu: &WebGpu<E>, layer: &Lora, dims: Dims) -> (Vec<E>, Vec<E>, u64) {
    let [x, w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(|mat| up::<_, E>(gpu, mat));
    let bias = up::<_, E>(gpu, layer.bias.as_ref().unwrap());
    let (mut h, mut y) = (Tensor::zeros(gpu, (dims.m, dims.r)).unwrap(), Tensor::zeros(gpu, (dims.m, dims.n)).unwrap());
    let (mut da, mut db) = (Tensor::zeros(gpu, (dims.r, dims.k)).unwrap(), Tensor::zeros(gpu, (dims.n, dims.r)).unwrap());
    let mut dx = Tensor::zeros(gpu, (dims.m, dims.k)).unwrap();
    let launches = gpu.counts().launches;
    let (w, a, b, scale, dropout) = ((&w).into(), (&a).into(), (&b).into(), layer.scale as f32, None);
    let (bias, h_out, y_out) = (Some(bias.view()), h.view_mut(), (&mut y).into());
    LoraForward { x: x.view(), w: Some(w), bias, a, b, scale, dropout, h: h_out, y: y_out }.run(gpu).unwrap();
    let (da, db, dx_out) = (da.view_mut(), db.view_mut(), Some((&mut dx).into()));
    let (x, h, dy) = (x.view(), h.view(), dy.view());
    LoraBackward { x, w: Some(w), a, b, h, dy, scale, dropout, da, db, dbias: None, dx: dx_out }.run(gpu).unwrap();
    let launches = gpu.counts().launches - launches;
    (y.to_vec(gpu).unwrap(), dx.to_vec(gpu).unwrap(), launches)
}

/// A layer in buffers of the caller has the bits and the launches of one in tensors, copies nothing, and writes only to the matrices.
fn lent_layers_are_exact<E: Float>(gpu: &WebGpu<E>, dims: Dims) {
    let layer = random::<E>(dims, 0.5, 3);
    let (y, dx, launches) = in_tensors(gpu, &layer, dims);
    let numbers = |mat: &Mat| -> Vec<E> { mat.data.iter().map(|&x| E::from_f32(x as f32)).collect() };
    let wide = |mat: &Mat| Wide::new((mat.rows, mat.cols), Some(&numbers(mat)));
    let [x, w, a, b, dy] = [&layer.x, &layer.w, &layer.a, &layer.b, &layer.dy].map(wide);
    let bias = wide(layer.bias.as_ref().unwrap());
    let (y_wide, dx_wide) = (Wide::<E>::new((dims.m, dims.n), None), Wide::<E>::new((dims.m, dims.k), None));
    let whole = |wide: &Wide<E>| 0..(wide.elements.len() * size_of::<E>()) as u64;
    let inputs = [&x, &w, &a, &b, &dy, &bias].map(|wide| (buffer(gpu, &wide.elements, STORAGE), wide));
    let outputs = [&y_wide, &dx_wide].map(|wide| buffer(gpu, &wide.elements, STORAGE | wgpu::BufferUsages::COPY_SRC));
    let (mut h, mut da) = (Tensor::zeros(gpu, (dims.m, dims.r)).unwrap(), Tensor::zeros(gpu, (dims.r, dims.k)).unwrap());
    let mut db = Tensor::zeros(gpu, (dims.n, dims.r)).unwrap();

    let before = gpu.counts();
    let lent = inputs.each_ref().map(|(buffer, wide)| (gpu.lend::<E>(buffer, whole(wide)).unwrap(), *wide));
    let [x, w, a, b, dy, bias] =
        lent.each_ref().map(|(lent, wide)| lent.view_strided::<E>(wide.shape, wide.offset, wide.stride).unwrap());
    let mut y_lent = gpu.lend_mut::<E>(&outputs[0], whole(&y_wide)).unwrap();
    let mut dx_lent = gpu.lend_mut::<E>(&outputs[1], whole(&dx_wide)).unwrap();
    let y_out = y_lent.view_strided_mut(y_wide.shape, y_wide.offset, y_wide.stride).unwrap().into();
    let dx_out = Some(dx_lent.view_strided_mut(dx_wide.shape, dx_wide.offset, dx_wide.stride).unwrap().into());
    let (w, a, b, scale, dropout) = (w.into(), a.into(), b.into(), layer.scale as f32, None);
    LoraForward { x, w: Some(w), bias: Some(bias), a, b, scale, dropout, h: h.view_mut(), y: y_out }.run(gpu).unwrap();
    let (da, db, h) = (da.view_mut(), db.view_mut(), h.view());
    LoraBackward { x, w: Some(w), a, b, h, dy, scale, dropout, da, db, dbias: None, dx: dx_out }.run(gpu).unwrap();
    let after = gpu.counts();
    assert_eq!(after.launches - before.launches, launches, "{dims:?}");
    let copied = |counts: lowrank::backend::webgpu::Counts| (counts.copies, counts.uploads, counts.downloads);
    assert_eq!(copied(after), copied(before), "{dims:?}: copies, uploads, downloads");
    assert!(after.buffers <= before.buffers + 1, "{dims:?}: dh is the only scratch");

    let bits = |numbers: &[E]| -> Vec<u32> { numbers.iter().map(|x| x.to_f32().to_bits()).collect() };
    assert_eq!(bits(&y_wide.matrix(&contents(gpu, &outputs[0]))), bits(&y), "{dims:?}: y");
    assert_eq!(bits(&dx_wide.matrix(&contents(gpu, &outputs[1]))), bits(&dx), "{dims:?}: dx");
}

/// On a device of its own, so that only this test is counted.
#[test]
fn lent_layers_have_the_bits_of_tensors_and_nothing_is_copied() {
    or_return!(shared_f32());
    let gpu = WebGpu::<f32>::new().unwrap();
    for (m, k, n, r) in [(18, 20, 70, 5), (3, 33, 64, 1), (1, 64, 40, 4)] {
        lent_layers_are_exact(&gpu, Dims { m, k, n, r });
    }
}

#[test]
fn lent_layers_of_halves_have_the_bits_of_tensors() {
    or_return!(shared_f16());
    let wide = WebGpu::<f32>::new().unwrap();
    let gpu = WebGpu::<f16>::from_device(wide.wgpu_device().clone(), wide.wgpu_queue().clone()).unwrap();
    lent_layers_are_exact(&gpu, Dims { m: 18, k: 20, n: 70, r: 5 });
    lent_layers_are_exact(&gpu, Dims { m: 2, k: 33, n: 17, r: 1 });
}

/// A layer's `y` is added to the result of another kernel.
#[test]
fn an_update_is_added_to_what_a_lent_buffer_holds() {
    let gpu = or_return!(shared_f32());
    let y = buffer(&gpu, &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], STORAGE | wgpu::BufferUsages::COPY_SRC);
    let [x, a, b] = [[1.0f32, 2.0], [3.0, 1.0], [1.0, -1.0]].map(|numbers| buffer(&gpu, &numbers, STORAGE));
    let [x, a, b] = [&x, &a, &b].map(|buffer| gpu.lend::<f32>(buffer, 0..8).unwrap());
    let mut h = Tensor::zeros(&gpu, (1, 1)).unwrap();
    let mut lent = gpu.lend_mut::<f32>(&y, 8..16).unwrap();
    let out = Output::AddTo(lent.view_mut((1, 2)).unwrap());
    let [x, a] = [&x, &a].map(|lent| lent.view((1, 2)).unwrap());
    let (a, b) = (a.into(), b.view((2, 1)).unwrap().into());
    LoraForward { x, w: None, bias: None, a, b, scale: 2.0, dropout: None, h: h.view_mut(), y: out }.run(&gpu).unwrap();
    assert_eq!(contents::<_, f32>(&gpu, &y), [1.0, 2.0, 13.0, -6.0, 5.0, 6.0]);
}

#[test]
fn buffers_that_cannot_be_lent_are_refused_by_name() {
    let gpu = or_return!(shared_f32());
    let error = |buffer: &wgpu::Buffer, bytes| gpu.lend::<f32>(buffer, bytes).unwrap_err().to_string();
    let fine = buffer(&gpu, &[0.0f32; 4], STORAGE);
    assert_eq!(error(&fine, 4..20), "lend: `bytes` is 4..20, want within the buffer's 0..16");
    assert_eq!(error(&fine, 2..10), "lend: `bytes` is 2..10, want whole elements of 4 bytes");
    #[allow(clippy::reversed_empty_ranges, reason = "a caller may pass one")]
    let reversed = 8..4;
    assert!(error(&fine, reversed).contains("within the buffer"));
    let without = buffer(&gpu, &[0.0f32; 4], wgpu::BufferUsages::COPY_SRC);
    assert!(error(&without, 0..16).ends_with("want one with the usage STORAGE"), "{}", error(&without, 0..16));
    let lent = gpu.lend::<f32>(&fine, 4..16).unwrap();
    assert!(matches!(lent.view::<f32>((2, 2)), Err(Error::Value { .. })));
    assert!(matches!(lent.view_strided::<f32>((2, 2), 0, 1), Err(Error::Value { .. })));
    assert!(gpu.lend_mut::<f32>(&without, 0..16).unwrap_err().to_string().starts_with("lend_mut: `buffer`"));

    let descriptor = wgpu::BufferDescriptor { label: None, size: 6, usage: STORAGE, mapped_at_creation: false };
    let odd = gpu.wgpu_device().create_buffer(&descriptor);
    let lent = |bytes| gpu.lend::<f16>(&odd, bytes).map(drop);
    assert!(lent(0..4).is_ok() && lent(2..4).is_ok());
    assert!(lent(0..6).unwrap_err().to_string().contains("whole words"));

    // A buffer of another wgpu instance is detected if its id is unknown here, or belongs to a different buffer.
    let other = WebGpu::<f32>::new().unwrap();
    let foreign = buffer(&other, &[0.0f32; 1000], STORAGE);
    assert!(error(&foreign, 0..16).contains("of another device"), "{}", error(&foreign, 0..16));
    drop(gpu.lend::<f32>(&fine, 0..16).unwrap()); // this device still works
}

#[test]
fn no_buffer_is_read_and_written_by_one_verb() {
    let gpu = or_return!(shared_f32());
    let both = buffer(&gpu, &[1.0f32; 64], STORAGE | wgpu::BufferUsages::COPY_SRC);
    let x = gpu.lend::<f32>(&both, 0..16).unwrap();
    let mut y = gpu.lend_mut::<f32>(&both, 16..32).unwrap();
    let error = Add { x: x.view((2, 2)).unwrap(), y: y.view_mut((2, 2)).unwrap() }.run(&gpu).unwrap_err().to_string();
    assert!(error.starts_with("add: `y` is in the buffer of `x`, want a buffer"), "{error}");
    let w = Tensor::zeros(&gpu, (2, 2)).unwrap();
    let op = LinearForward { x: x.view((2, 2)).unwrap(), w: (&w).into(), bias: None, y: y.view_mut((2, 2)).unwrap().into() };
    let error = op.run(&gpu).unwrap_err().to_string();
    assert!(error.starts_with("linear_forward: `y` is in the buffer of `x`"), "{error}");
    let copied = y.view_mut::<f32>((2, 2)).unwrap().copy_from(&gpu, x.view((2, 2)).unwrap());
    assert!(copied.unwrap_err().to_string().starts_with("copy: `to` is in the buffer of `from`"));
    assert_eq!(contents::<_, f32>(&gpu, &both), [1.0; 64], "nothing was changed");

    // Gradients may share a buffer, but must not overlap.
    let (x, h, dy) = ([1.0f32; 4], [1.0f32; 2], [2.0f32; 4]);
    let [x, dy] = [x, dy].map(|numbers| Tensor::from_slice(&gpu, (2, 2), &numbers).unwrap());
    let (h, a, b) = (Tensor::from_slice(&gpu, (2, 1), &h).unwrap(), Tensor::zeros(&gpu, (1, 2)), Tensor::zeros(&gpu, (2, 1)));
    let (a, b) = (a.unwrap(), b.unwrap());
    let gradients = |second: u64| {
        let mut da = gpu.lend_mut::<f32>(&both, 32..40).unwrap();
        let mut db = gpu.lend_mut::<f32>(&both, second..second + 8).unwrap();
        let (da, db) = (da.view_mut((1, 2)).unwrap(), db.view_mut((2, 1)).unwrap());
        let (x, h, dy, a, b, scale) = (x.view(), h.view(), dy.view(), (&a).into(), (&b).into(), 1.0);
        LoraBackward { x, w: None, a, b, h, dy, scale, dropout: None, da, db, dbias: None, dx: None }.run(&gpu)
    };
    let error = gradients(36).unwrap_err().to_string();
    assert!(error.starts_with("lora_backward: `db` is in the memory of `da`, want memory of its own"), "{error}");
    gradients(40).unwrap();
    assert_eq!(contents::<_, f32>(&gpu, &both)[8..13], [0.0, 0.0, 4.0, 4.0, 1.0]);
}

/// On a device of its own, so that only this test is counted.
#[test]
fn copies_stay_on_the_device() {
    or_return!(shared_f32());
    let gpu = WebGpu::<f32>::new().unwrap();
    let numbers: Vec<f32> = (0..35).map(|e| e as f32).collect();
    let tensor = Tensor::from_slice(&gpu, (5, 7), &numbers).unwrap();
    let before = gpu.counts();
    let clone = tensor.try_clone(&gpu).unwrap();
    let after = gpu.counts();
    assert_eq!((after.copies, after.launches), (before.copies + 1, before.launches));
    assert_eq!((after.uploads, after.downloads, after.submissions), (before.uploads, before.downloads, before.submissions));
    assert_eq!(clone.to_vec(&gpu).unwrap(), numbers);

    // Columns 1..4 of rows 1..5, to columns 3..6 of another.
    let mut other = Tensor::from_slice(&gpu, (4, 7), &[-1.0f32; 28]).unwrap();
    let before = gpu.counts();
    let from = tensor.view().row_range(1..5).unwrap().column_range(1..4).unwrap();
    other.view_mut().column_range(3..6).unwrap().copy_from(&gpu, from).unwrap();
    let after = gpu.counts();
    assert_eq!((after.copies, after.launches), (before.copies, before.launches + 1));
    assert_eq!((after.uploads, after.downloads), (before.uploads, before.downloads));
    let want = |e: usize| if (3..6).contains(&(e % 7)) { ((e / 7 + 1) * 7 + e % 7 - 2) as f32 } else { -1.0 };
    assert_eq!(other.to_vec(&gpu).unwrap(), (0..28).map(want).collect::<Vec<_>>());
}

/// Copies of 16-bit elements at every offset, contiguous and strided, keep every bit, also of NaN, and change nothing outside the matrix.
#[test]
fn copies_of_16_bit_elements_keep_their_neighbours() {
    let gpu = or_return!(shared_f32());
    let poor = gpu.clone().with_limits(super::Limits { binding_bytes: 512, ..super::POOR });
    let bits = |first: u16, len: usize| -> Vec<f16> { (first..).take(len).map(|bits| f16::from_bits(bits << 3 | 5)).collect() };
    for gpu in [&gpu, &poor] {
        for (rows, cols, from_at, from_row, to_at, to_row) in
            [(1, 1, 0, 1, 1, 1), (3, 5, 1, 5, 0, 5), (7, 4, 3, 9, 2, 4), (40, 21, 2, 22, 5, 33), (2, 900, 1, 901, 0, 900)]
        {
            let (source, target) = (bits(1, from_at + rows * from_row), bits(9000, to_at + rows * to_row));
            let (from, to) = (buffer(gpu, &source, STORAGE), buffer(gpu, &target, STORAGE | wgpu::BufferUsages::COPY_SRC));
            let from = gpu.lend::<f16>(&from, 0..2 * source.len() as u64).unwrap();
            let mut lent = gpu.lend_mut::<f16>(&to, 0..2 * target.len() as u64).unwrap();
            let view = from.view_strided((rows, cols), from_at, from_row).unwrap();
            lent.view_strided_mut((rows, cols), to_at, to_row).unwrap().copy_from(gpu, view).unwrap();
            let mut want = target;
            for row in 0..rows {
                want[to_at + row * to_row..][..cols].copy_from_slice(&source[from_at + row * from_row..][..cols]);
            }
            let bits = |numbers: Vec<f16>| -> Vec<u16> { numbers.into_iter().map(f16::to_bits).collect() };
            let got = contents::<_, f16>(gpu, &to)[..want.len()].to_vec();
            assert_eq!(bits(got), bits(want), "{rows}×{cols} {from_at} {from_row} {to_at} {to_row}");
        }
    }
}
