//! wrk, the usual generator of HTTP requests.

use std::io::Read;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use super::cpu::Meter;
use super::interrupt;
use super::rig::Rig;
use super::worker::protocol::Latency;
use super::worker::{Measured, Timing};
use crate::testbed::Ids;

/// Runs wrk with one thread in the client's pod.
pub fn measure(rig: &Rig<'_>, to: SocketAddr, connections: usize, timing: Timing) -> Result<Measured> {
    let pods = rig.pods();
    let meter = Meter::new(&pods.cgroups())?;
    let seconds = timing.measure.as_secs().max(1);
    let mut command = pods.client().command_as("wrk", Ids::APP)?;
    command.args(["--threads", "1", "--latency", "--timeout", "5s"]);
    command.args(["--connections", &connections.to_string(), "--duration", &format!("{seconds}s")]);
    command.arg(format!("http://{to}/")).stdin(Stdio::null()).stdout(Stdio::piped());
    let before = meter.read()?;
    let begun = Instant::now();
    let mut child = command.spawn().context("starting wrk; is its package installed?")?;
    let mut text = String::new();
    child.stdout.take().context("wrk has no output")?.read_to_string(&mut text)?;
    let status = child.wait()?;
    let cpu = meter.read()?.since(&before);
    interrupt::check()?;
    ensure!(status.success(), "wrk: {status}\n{text}");
    let mut measured = read(&text).with_context(|| format!("understanding wrk:\n{text}"))?;
    measured.cpu = cpu;
    measured.seconds = measured.seconds.min(begun.elapsed().as_secs_f64());
    ensure!(measured.failures * 100 <= measured.operations, "wrk: requests failed\n{text}");
    Ok(measured)
}

fn read(text: &str) -> Result<Measured> {
    let mut measured = Measured {
        seconds: 0.0,
        operations: 0,
        failures: 0,
        latency: None,
        cpu: super::cpu::Spent::default(),
    };
    let mut percentiles = [0; 3];
    for line in text.lines().map(str::trim) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["50%", time] => percentiles[0] = nanoseconds(time)?,
            // wrk has no 99.9 %.
            ["99%", time] => percentiles[1..].fill(nanoseconds(time)?),
            [count, "requests", "in", time, ..] => {
                measured.operations = count.parse()?;
                measured.seconds = f64::from(nanoseconds(time.trim_end_matches(','))?) / 1e9;
            }
            ["Non-2xx", "or", "3xx", "responses:", count] => measured.failures += count.parse::<u64>()?,
            ["Socket", "errors:", ..] => {
                let counts = words.iter().filter_map(|word| word.trim_end_matches(',').parse::<u64>().ok());
                measured.failures += counts.sum::<u64>();
            }
            _ => {}
        }
    }
    if measured.operations == 0 {
        bail!("there is no count of requests");
    }
    let [p50, p99, p999] = percentiles;
    measured.latency = Some(Latency { p50, p99, p999 });
    Ok(measured)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float becomes the nearest integer"
)]
fn nanoseconds(time: &str) -> Result<u32> {
    let units = [("us", 1e3), ("ms", 1e6), ("s", 1e9)];
    let (number, factor) = units
        .into_iter()
        .find_map(|(unit, factor)| Some((time.strip_suffix(unit)?, factor)))
        .with_context(|| format!("{time} has no unit"))?;
    Ok((number.parse::<f64>()? * factor) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_is_understood() {
        let text = "Running 1s test @ http://10.66.0.102:8080/
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.21ms  300.00us   9.00ms   90.00%
    Req/Sec    13.00k     1.00k   14.00k    80.00%
  Latency Distribution
     50%    1.10ms
     75%    1.30ms
     90%    1.50ms
     99%    2.50ms
  13040 requests in 1.01s, 1.50MB read
  Socket errors: connect 0, read 3, write 0, timeout 0
Requests/sec:  12911.00
";
        let measured = read(text).expect("it is wrk's");
        assert_eq!(measured.operations, 13040);
        assert_eq!(measured.failures, 3);
        assert!((measured.seconds - 1.01).abs() < 1e-9);
        assert_eq!(measured.latency, Some(Latency { p50: 1_100_000, p99: 2_500_000, p999: 2_500_000 }));
        assert!(read("unable to connect").is_err());
    }
}
