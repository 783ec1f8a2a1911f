//! The chart: bars as SVG, drawn by hand, in the colours of the page around it.

use std::fmt::Write as _;

use super::figures::{Figure, Sections, Unit, float};
use crate::groups::{Group, peers};

const WIDTH: f64 = 900.0;
/// Where bars begin; their labels end before it.
const BARS_FROM: f64 = 430.0;
/// Where the longest bar ends; its value is written behind it.
const BARS_TO: f64 = 810.0;
const BAR_HEIGHT: f64 = 16.0;
const ROW_HEIGHT: f64 = 24.0;
const HEADING_HEIGHT: f64 = 40.0;
const MARGIN: f64 = 16.0;

const STYLE: &str = "\
    .ground { fill: #ffffff } text { font: 13px system-ui, sans-serif; fill: #1f2933 } .heading { font-weight: 600; font-size: 15px }
    .label { text-anchor: end } .met { fill: #2f855a } .missed { fill: #c05621 } .plain { fill: #7b8794 } .goal { stroke: #1f2933; stroke-width: 2 }
    @media (prefers-color-scheme: dark) {
      .ground { fill: #0d1117 } text { fill: #e4e7eb } .met { fill: #48bb78 } .missed { fill: #ed8936 } .plain { fill: #9aa5b1 } .goal { stroke: #e4e7eb }
    }";

struct Panel {
    heading: &'static str,
    bars: Vec<Bar>,
}

struct Bar {
    label: String,
    written: String,
    value: f64,
    goal: Option<f64>,
    class: &'static str,
}

/// Draws what can be compared: rates of peers, and ratios.
pub fn chart(sections: &Sections) -> String {
    let panels = [
        Panel { heading: "Drain, deliveries a second", bars: rates(sections) },
        Panel {
            heading: "Our drain against others (line: goal)",
            bars: ratios(sections, |group| group == Group::Peers),
        },
        Panel {
            heading: "Ratios, larger is better (line: goal; orange: not met)",
            bars: ratios(sections, |group| group != Group::Peers),
        },
    ];
    let panels: Vec<_> = panels.into_iter().filter(|panel| !panel.bars.is_empty()).collect();
    let height = panels.iter().map(Panel::height).sum::<f64>() + MARGIN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n\
         <title>Benchmarks of webhook-processor</title>\n<style>\n{STYLE}\n</style>\n<rect class=\"ground\" width=\"100%\" height=\"100%\" rx=\"6\"/>\n"
    );
    let mut top = 0.0;
    for panel in &panels {
        panel.draw(&mut svg, top).expect("a String takes it");
        top += panel.height();
    }
    svg + "</svg>\n"
}

impl Panel {
    fn height(&self) -> f64 {
        HEADING_HEIGHT + float(self.bars.len()) * ROW_HEIGHT
    }

    fn draw(&self, svg: &mut String, top: f64) -> std::fmt::Result {
        let longest =
            self.bars.iter().map(|bar| bar.value.max(bar.goal.unwrap_or_default())).fold(0.0, f64::max);
        let place = |value: f64| BARS_FROM + (BARS_TO - BARS_FROM) * value / longest.max(f64::MIN_POSITIVE);
        writeln!(
            svg,
            "<text class=\"heading\" x=\"{MARGIN}\" y=\"{:.1}\">{}</text>",
            top + 27.0,
            self.heading
        )?;
        let mut y = top + HEADING_HEIGHT;
        for bar in &self.bars {
            let (text_y, end) = (y + 13.0, place(bar.value));
            writeln!(
                svg,
                "<text class=\"label\" x=\"{}\" y=\"{text_y:.1}\">{}</text>",
                BARS_FROM - 10.0,
                escaped(&bar.label)
            )?;
            let (class, width) = (bar.class, end - BARS_FROM);
            writeln!(
                svg,
                "<rect class=\"{class}\" x=\"{BARS_FROM}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR_HEIGHT}\" rx=\"2\"/>"
            )?;
            let goal = bar.goal.map(place);
            if let Some(x) = goal {
                writeln!(
                    svg,
                    "<line class=\"goal\" x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{x:.1}\" y2=\"{:.1}\"/>",
                    y - 2.0,
                    y + BAR_HEIGHT + 2.0
                )?;
            }
            let text_x = end.max(goal.unwrap_or_default()) + 8.0;
            writeln!(svg, "<text x=\"{text_x:.1}\" y=\"{text_y:.1}\">{}</text>", escaped(&bar.written))?;
            y += ROW_HEIGHT;
        }
        Ok(())
    }
}

fn rates(sections: &Sections) -> Vec<Bar> {
    let figures = sections.get(&Group::Peers).map(|section| section.figures.as_slice()).unwrap_or_default();
    let rates = figures.iter().filter(|figure| figure.unit == Unit::PerSecond);
    rates
        .map(|figure| Bar { class: if figure.name == peers::OURS { "met" } else { "plain" }, ..bar(figure) })
        .collect()
}

fn ratios(sections: &Sections, is_meant: impl Fn(Group) -> bool) -> Vec<Bar> {
    let sections = sections.iter().filter(|(group, _)| is_meant(**group));
    let figures = sections.flat_map(|(_, section)| &section.figures);
    figures.filter(|figure| figure.unit == Unit::Ratio && figure.larger_is_better).map(bar).collect()
}

fn bar(figure: &Figure) -> Bar {
    Bar {
        label: figure.name.clone(),
        written: figure.unit.write(figure.value),
        value: figure.value,
        goal: figure.goal,
        class: if figure.is_met() == Some(false) { "missed" } else { "met" },
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panel_is_drawn_to_scale() {
        let bar =
            |value, goal| Bar { label: "a < b".into(), written: "0.50".into(), value, goal, class: "met" };
        let panel = Panel { heading: "Ratios", bars: vec![bar(0.5, Some(1.0)), bar(0.25, None)] };
        let mut svg = String::new();
        panel.draw(&mut svg, 0.0).unwrap();
        assert!(svg.contains("width=\"190.0\"") && svg.contains("width=\"95.0\""), "{svg}");
        assert!(svg.contains("x1=\"810.0\""), "the goal is at the end: {svg}");
        assert!(svg.contains("a &lt; b"), "{svg}");
    }

    #[test]
    fn nothing_measured_is_an_empty_chart() {
        assert!(chart(&Sections::new()).ends_with("</svg>\n"));
    }
}
