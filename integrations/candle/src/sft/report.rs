//! What a run shows: a progress bar, and a chart of its losses.

use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::Step;
use crate::{Error, Result};

/// A bar for a run of so many steps, on the terminal where there is one. [`Step::show`] moves it.
pub fn progress_bar(steps: usize) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64);
    let template = "{bar:30} {pos}/{len} steps, {eta} left, {msg}";
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

impl Step {
    /// Moves the bar to this step.
    pub fn show(&self, bar: &ProgressBar) {
        bar.set_position(self.index as u64 + 1);
        bar.set_message(format!("loss {:.4}", self.loss));
    }
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

/// Writes a chart of the losses as SVG: those of the steps, and those of the held-back part, each beside the number of steps done.
///
/// Errors: [`Error::File`].
pub fn plot(path: impl AsRef<Path>, steps: &[Step], held_back: &[(usize, f64)]) -> Result<()> {
    let (path, mut svg) = (path.as_ref(), String::new());
    let root = SVGBackend::with_string(&mut svg, (840, 420)).into_drawing_area();
    let drawn = draw(&root, steps, held_back);
    drop(root);
    drawn.map_err(|error| Error::file(path, error))?;
    Ok(lowrank::file::write_whole(path, svg.as_bytes())?)
}

fn draw(root: &DrawingArea<SVGBackend<'_>, Shift>, steps: &[Step], held_back: &[(usize, f64)]) -> Drawn {
    const FONT: (&str, u32) = ("sans-serif", 15);
    let (blue, orange) = (RGBColor(0x1f, 0x6f, 0xb4), RGBColor(0xd9, 0x6b, 0x0b));
    let trained: Vec<(f64, f64)> = steps.iter().map(|step| (step.index as f64 + 1.0, step.loss)).collect();
    let held: Vec<(f64, f64)> = held_back.iter().map(|&(step, loss)| (step as f64, loss)).collect();
    let last = trained.iter().chain(&held).fold(1.0, |last: f64, point| last.max(point.0));
    let highest = trained.iter().chain(&held).fold(1e-6, |highest: f64, point| highest.max(point.1));
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(root)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..last, 0.0..highest * 1.05)?;
    let whole = |x: &f64| format!("{x:.0}");
    chart.configure_mesh().x_label_formatter(&whole).x_desc("step").y_desc("loss").label_style(FONT).draw()?;
    for (name, points, color) in [("training", trained, blue), ("held back", held, orange)] {
        let line = chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?;
        line.label(name).legend(move |(x, y)| Rectangle::new([(x, y - 2), (x + 14, y + 2)], color.filled()));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).label_font(FONT).draw()?;
    Ok(root.present()?)
}
