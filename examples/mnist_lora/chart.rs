//! Two charts as SVG. Labels are stored as text, so the viewer chooses the font.

use crate::mnist::DIGITS;
use lowrank::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::experiment::{Outcome, Phase};

const FONT: (&str, u32) = ("sans-serif", 15);
const TITLE: (&str, u32) = ("sans-serif", 20);
const BEFORE: RGBColor = RGBColor(0x9a, 0xa5, 0xb1);
const ON: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
/// Steps that the training loss is averaged over, because the loss of single batches of 10 is noisy.
const WINDOW: usize = 50;

type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Test errors of each digit, before and with the adapters on.
pub fn errors(outcome: &Outcome) -> Result<String> {
    svg((840, 420), |root| {
        let highest = outcome.base.errors.iter().chain(&outcome.on.errors).max().map_or(1, |&most| most.max(1));
        let caption = format!("Test errors of each digit; adapters tuned on digit {}", outcome.digit);
        let mut chart = ChartBuilder::on(root)
            .caption(caption, TITLE)
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(48)
            .build_cartesian_2d(-0.5..DIGITS as f64 - 0.5, 0.0..highest as f64 * 1.3)?; // room for the legend
        let mut mesh = chart.configure_mesh();
        mesh.disable_x_mesh().x_labels(DIGITS).x_label_formatter(&whole).y_label_formatter(&whole).label_style(FONT).draw()?;
        for (name, errors, color, left) in
            [("before", &outcome.base.errors, BEFORE, -0.36), ("adapters on", &outcome.on.errors, ON, 0.02)]
        {
            let bar = |(d, &count): (usize, &usize)| {
                let left = d as f64 + left;
                Rectangle::new([(left, 0.0), (left + 0.34, count as f64)], color.filled())
            };
            let bars = chart.draw_series(errors.iter().enumerate().map(bar))?;
            bars.label(name).legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], color.filled()));
        }
        let legend = SeriesLabelPosition::UpperLeft;
        chart.configure_series_labels().position(legend).background_style(WHITE.mix(0.8)).label_font(FONT).draw()?;
        Ok(())
    })
}

/// The loss of both phases, step by step.
pub fn losses(outcome: &Outcome) -> Result<String> {
    svg((840, 420), |root| {
        let (left, right) = root.split_horizontally(420);
        curve(&left, &format!("Training, mean of {WINDOW} steps"), &outcome.pretrain, WINDOW)?;
        curve(&right, &format!("Tuning on digit {}", outcome.digit), &outcome.tune, 1)
    })
}

fn curve(panel: &Panel<'_>, caption: &str, phase: &Phase, window: usize) -> Drawn {
    let mean = |losses: &[f32]| f64::from(losses.iter().sum::<f32>()) / losses.len() as f64;
    let points: Vec<(f64, f64)> =
        phase.losses.chunks(window).enumerate().map(|(i, losses)| ((i * window) as f64, mean(losses))).collect();
    let highest = points.iter().fold(1e-6, |highest: f64, point| highest.max(point.1));
    let mut chart = ChartBuilder::on(panel)
        .caption(caption, TITLE)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..phase.losses.len().max(1) as f64, 0.0..highest * 1.05)?;
    let mut mesh = chart.configure_mesh();
    mesh.x_labels(5).x_label_formatter(&whole).x_desc("step").y_desc("loss").label_style(FONT).draw()?;
    chart.draw_series(LineSeries::new(points, ON.stroke_width(2)))?;
    Ok(())
}

fn whole(x: &f64) -> String {
    format!("{x:.0}")
}

fn svg(size: (u32, u32), draw: impl FnOnce(&Panel<'_>) -> Drawn) -> Result<String> {
    let mut text = String::new();
    let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
    let drawn = root.fill(&WHITE).map_err(Into::into).and_then(|()| draw(&root)).and_then(|()| Ok(root.present()?));
    drop(root);
    let failed = |error: Box<dyn std::error::Error>| Error::File { path: "chart".into(), reason: error.to_string() };
    drawn.map(|()| text).map_err(failed)
}
