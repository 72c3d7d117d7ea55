use anyhow::Result;
use rand::SeedableRng as _;
use tests::bench::{crew::{Crew, WORKER}, interrupt, plan::{Plan, Section}, mode::Mode, progress::Progress, rounds, worker};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == WORKER) {
        return worker::run(&serde_json::from_str(&args[2])?);
    }
    interrupt::watch()?;
    let crew = Crew::new()?;
    let plan = Plan { modes: vec![Mode::None, Mode::Explicit, Mode::IptablesNft, Mode::IptablesLegacy, Mode::Nft], sections: vec![Section::Connect, Section::Exchange, Section::Stream], quick: true, rounds: None };
    let mut random = rand::rngs::StdRng::seed_from_u64(1);
    for suite in plan.suites() {
        let mut p = Progress::new(suite.seconds());
        let rows = rounds::run(&suite, &crew, &mut random, &mut p)?;
        for w in &suite.works { for c in &suite.cells {
            let r: Vec<_> = rows.iter().filter(|r| r.work == *w && r.cell == *c).collect();
            let s = tests::bench::statistics::Spread::of(r.iter().map(|r| r.measured.operations as f64 / r.measured.seconds / w.per_unit())).unwrap();
            let cpu = tests::bench::statistics::Spread::of(r.iter().map(|r| r.measured.cpu.ours*1e6 / r.measured.operations as f64 * w.per_unit())).unwrap();
            println!("{w:20} {:16} {:10.0} {:10.0}-{:10.0} cpu {:8.2} fail {}", c.mode, s.median, s.low, s.high, cpu.median, r.iter().map(|r| r.measured.failures).sum::<u64>());
        } }
    }
    Ok(())
}
