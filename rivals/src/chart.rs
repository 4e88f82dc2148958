//! The rows as a chart (SVG): for each layer, everyone's speed beside lowrank's.

use std::error::Error;

use plotters::prelude::*;

use crate::table::Row;

const FONT: (&str, u32) = ("sans-serif", 14);
const TITLE: (&str, u32) = ("sans-serif", 18);
const OURS: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const OTHERS: [RGBColor; 6] = [
    RGBColor(0x9a, 0xa5, 0xb1),
    RGBColor(0xc9, 0x8b, 0x3c),
    RGBColor(0x6b, 0x9e, 0x78),
    RGBColor(0xa0, 0x6c, 0xa8),
    RGBColor(0xb8, 0x5c, 0x5c),
    RGBColor(0x5c, 0x8f, 0xa8),
];
/// Width of a row's bars, of the 1 that a row has.
const BARS: f64 = 0.8;

/// Draws `speed = lowrank's time / their time`, one group of bars for each row; lowrank is 1.
pub fn svg(rows: &[Row], title: &str) -> Result<String, Box<dyn Error>> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in rows.iter().flat_map(|row| &row.timed) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let speeds = rows.iter().flat_map(|row| row.timed[1..].iter().map(|(_, timed)| 1.0 / timed.ratio));
    let highest = speeds.fold(1.0, f64::max);
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (160 * rows.len().max(3) as u32 + 120, 400)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, TITLE)
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(48)
            .build_cartesian_2d(-0.5..rows.len() as f64 - 0.5, 0.0..highest * 1.35)?;
        let label = |x: &f64| rows.get(x.round() as usize).filter(|_| x.fract() == 0.0).map_or(String::new(), describe);
        let mut mesh = chart.configure_mesh();
        mesh.disable_x_mesh().x_labels(rows.len()).x_label_formatter(&label).y_desc("speed (lowrank = 1)").label_style(FONT);
        mesh.draw()?;
        for (i, name) in names.iter().enumerate() {
            let color = if i == 0 { OURS } else { OTHERS[(i - 1) % OTHERS.len()] };
            let width = BARS / names.len() as f64;
            let bars = rows.iter().enumerate().filter_map(|(at, row)| {
                let (_, timed) = row.timed.iter().find(|(known, _)| known == name)?;
                let speed = if i == 0 { 1.0 } else { 1.0 / timed.ratio };
                let left = at as f64 - BARS / 2.0 + i as f64 * width;
                Some(Rectangle::new([(left, 0.0), (left + 0.9 * width, speed)], color.filled()))
            });
            let series = chart.draw_series(bars)?;
            series.label(*name).legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], color.filled()));
        }
        let legend = SeriesLabelPosition::UpperRight;
        chart.configure_series_labels().position(legend).background_style(WHITE.mix(0.8)).label_font(FONT).draw()?;
        root.present()?;
    }
    Ok(text)
}

/// The verb, the layer and the threads of a row.
fn describe(row: &Row) -> String {
    let threads = row.threads.map_or(String::new(), |threads| format!(", {threads}T"));
    let verb = row.verb.to_string().replace("lora_", "").replace('_', "+");
    format!("{verb} {} {}{threads}", row.shape.name, row.dtype)
}
