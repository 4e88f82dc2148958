//! The table as SVG. The text stays text: whoever shows the file brings the font.

use lowrank::{Error, Result};
use plotters::prelude::*;

use crate::serving::Served;

const FONT: (&str, u32) = ("sans-serif", 15);
const BAR: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);

/// Tokens a second for each number of adapters.
pub fn tokens(table: &[(usize, Served)]) -> Result<String> {
    let mut text = String::new();
    let drawn = draw(table, &mut text);
    drawn.map(|()| text).map_err(|error| Error::File { path: "chart".into(), reason: error.to_string() })
}

fn draw(table: &[(usize, Served)], text: &mut String) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(text, (640, 400)).into_drawing_area();
    root.fill(&WHITE)?;
    let highest = table.iter().map(|(_, served)| served.tokens_a_second()).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&root)
        .caption("Tokens a second, by the number of adapters", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(-0.5..table.len() as f64 - 0.5, 0.0..highest * 1.1)?;
    let name = |x: &f64| {
        let at = (x.round() - x).abs() < 1e-6 && *x > -0.5;
        at.then(|| table.get(x.round() as usize).map(|(adapters, _)| adapters.to_string())).flatten().unwrap_or_default()
    };
    let mut mesh = chart.configure_mesh();
    mesh.disable_x_mesh().x_labels(table.len() * 2).x_label_formatter(&name).x_desc("adapters").label_style(FONT).draw()?;
    chart.draw_series(table.iter().enumerate().map(|(i, (_, served))| {
        Rectangle::new([(i as f64 - 0.3, 0.0), (i as f64 + 0.3, served.tokens_a_second())], BAR.filled())
    }))?;
    root.present()?;
    Ok(())
}
