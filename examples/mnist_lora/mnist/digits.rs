//! Generated digits: the points of a digit's strokes are moved by a random affine map and by a random smooth field (elastic distortion:
//! P. Simard et al., "Best practices for convolutional neural networks", ICDAR 2003), then drawn with a pen.
//!
//! Because the points are moved and not the pixels, a stroke keeps its width and its smooth edge.

use std::f64::consts::TAU;

use rayon::prelude::*;

use super::{DIGITS, Images, Labels, Split};
use lowrank::random::{Rng, philox};

/// Height and width of an image, in pixels.
const SIDE: usize = 28;
/// Segments of a curve: enough that points are less than a pixel apart.
const STEPS: usize = 24;
/// The number of waves in the smooth field.
const WAVES: usize = 3;

type Point = [f64; 2];

/// A part of a digit, in a square of side 2 around the origin, with x to the right and y down.
enum Stroke {
    /// Straight lines between these points.
    Line(&'static [Point]),
    /// A part of an ellipse: centre, radii, start and end; 1 is a full turn, clockwise from the right.
    Arc(Point, Point, [f64; 2]),
}

use Stroke::{Arc, Line};

/// The strokes of each digit.
const STROKES: [&[Stroke]; DIGITS] = [
    &[Arc([0.0, 0.0], [0.6, 0.95], [0.0, 1.0])],
    &[Line(&[[-0.3, -0.6], [0.1, -0.95], [0.1, 0.95]])],
    &[Arc([0.0, -0.45], [0.55, 0.5], [0.5, 1.1]), Line(&[[0.44, -0.16], [-0.6, 0.95], [0.65, 0.95]])],
    &[Arc([-0.05, -0.48], [0.5, 0.47], [0.55, 1.25]), Arc([-0.05, 0.47], [0.6, 0.48], [0.75, 1.45])],
    &[Line(&[[0.2, -0.95], [-0.65, 0.3], [0.7, 0.3]]), Line(&[[0.35, -0.25], [0.35, 0.95]])],
    &[Line(&[[0.55, -0.95], [-0.4, -0.95], [-0.5, -0.1]]), Arc([-0.05, 0.35], [0.6, 0.6], [0.63, 1.42])],
    &[Arc([0.45, 0.35], [1.0, 1.3], [0.5, 0.74]), Arc([0.0, 0.4], [0.55, 0.55], [0.0, 1.0])],
    &[Line(&[[-0.6, -0.95], [0.6, -0.95], [-0.15, 0.95]])],
    &[Arc([0.0, -0.48], [0.48, 0.47], [0.0, 1.0]), Arc([0.0, 0.47], [0.58, 0.48], [0.0, 1.0])],
    &[Arc([0.0, -0.4], [0.52, 0.53], [0.0, 1.0]), Line(&[[0.52, -0.4], [0.45, 0.3], [0.25, 0.95]])],
];

/// Draws `count` digits; each `part` of a seed has different ones.
pub(super) fn draw(seed: u64, part: u32, count: usize) -> Split {
    let mut pixels = vec![0; count * SIDE * SIDE];
    let mut labels = vec![0; count];
    pixels.par_chunks_exact_mut(SIDE * SIDE).zip(&mut labels).enumerate().for_each(|(i, (image, label))| {
        // Each image has its own random stream, so that any thread may draw it. The third word separates these keys from other uses.
        let [low, high, ..] = philox([seed as u32, (seed >> 32) as u32], [i as u32, part, 2, 0]);
        let mut rng = Rng::new(u64::from(high) << 32 | u64::from(low));
        *label = rng.below(DIGITS) as u8;
        ink(image, STROKES[usize::from(*label)], &Warp::random(&mut rng), rng.uniform(0.9, 1.7));
    });
    Split { images: Images { rows: SIDE, cols: SIDE, pixels }, labels: Labels(labels) }
}

/// The distortion of a digit.
struct Warp {
    /// The affine map to pixels: two rows of a matrix, each followed by the shift.
    rows: [[f64; 3]; 2],
    /// The smooth field: for each wave its two frequencies, its phase and its amplitude.
    waves: [([f64; 2], f64, Point); WAVES],
}

impl Warp {
    fn random(rng: &mut Rng) -> Self {
        let (angle, shear) = (rng.uniform(-0.22, 0.22), rng.uniform(-0.35, 0.35));
        let (width, height) = (rng.uniform(7.0, 10.0), rng.uniform(8.0, 10.0));
        let (sin, cos) = angle.sin_cos();
        let middle = SIDE as f64 / 2.0;
        let shift = [middle + rng.uniform(-2.0, 2.0), middle + rng.uniform(-2.0, 2.0)];
        let rows = [[width * cos, height * (shear * cos - sin), shift[0]], [width * sin, height * (shear * sin + cos), shift[1]]];
        let wave = |_| {
            let frequency = [rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5)];
            (frequency, rng.unit(), [0.1 * rng.gaussian(), 0.1 * rng.gaussian()])
        };
        Self { rows, waves: std::array::from_fn(wave) }
    }

    fn to_pixels(&self, [x, y]: Point) -> Point {
        let mut bent = [x, y];
        for (frequency, phase, crest) in &self.waves {
            let height = (TAU * (frequency[0] * x + frequency[1] * y + phase)).sin();
            bent = [bent[0] + height * crest[0], bent[1] + height * crest[1]];
        }
        self.rows.map(|[a, b, shift]| a * bent[0] + b * bent[1] + shift)
    }
}

/// Draws strokes with a pen of this radius in pixels.
fn ink(image: &mut [u8], strokes: &[Stroke], warp: &Warp, pen: f64) {
    for stroke in strokes {
        let points: Vec<Point> = points(stroke).into_iter().map(|point| warp.to_pixels(point)).collect();
        for pair in points.windows(2) {
            ink_segment(image, pair[0], pair[1], pen);
        }
    }
}

fn points(stroke: &Stroke) -> Vec<Point> {
    let part = |i: usize| i as f64 / STEPS as f64;
    match stroke {
        Arc(centre, radii, [from, to]) => (0..=STEPS)
            .map(|i| (TAU * (from + (to - from) * part(i))).sin_cos())
            .map(|(sin, cos)| [centre[0] + radii[0] * cos, centre[1] + radii[1] * sin])
            .collect(),
        Line(corners) => {
            let between = |a: Point, b: Point| move |i| [0, 1].map(|d| a[d] + (b[d] - a[d]) * part(i));
            corners.windows(2).flat_map(|pair| (0..=STEPS).map(between(pair[0], pair[1]))).collect()
        }
    }
}

/// Draws a line segment: white under the pen, with an edge that fades over one pixel.
fn ink_segment(image: &mut [u8], a: Point, b: Point, pen: f64) {
    let near = |low: f64, high: f64| {
        let clamp = |x: f64| x.clamp(0.0, SIDE as f64) as usize;
        clamp((low - pen).floor() - 1.0)..clamp((high + pen).ceil() + 1.0)
    };
    for row in near(a[1].min(b[1]), a[1].max(b[1])) {
        for col in near(a[0].min(b[0]), a[0].max(b[0])) {
            let distance = distance([col as f64 + 0.5, row as f64 + 0.5], a, b);
            let shade = (255.0 * (pen + 0.5 - distance).clamp(0.0, 1.0)) as u8;
            let pixel = &mut image[row * SIDE + col];
            *pixel = shade.max(*pixel);
        }
    }
}

/// The distance of a point from a line segment.
fn distance(p: Point, a: Point, b: Point) -> f64 {
    let (along, to_p) = ([b[0] - a[0], b[1] - a[1]], [p[0] - a[0], p[1] - a[1]]);
    let length2 = along[0] * along[0] + along[1] * along[1];
    let t = if length2 > 0.0 { ((to_p[0] * along[0] + to_p[1] * along[1]) / length2).clamp(0.0, 1.0) } else { 0.0 };
    let off = [to_p[0] - t * along[0], to_p[1] - t * along[1]];
    (off[0] * off[0] + off[1] * off[1]).sqrt()
}
