//! Runs the warps of a cluster in turn, each until it must wait, and completes barriers.

use std::collections::BTreeMap;

use crate::WARP;
use crate::cluster::{Cluster, whole_warp};
use crate::fault::{Fault, Kind};
use crate::shadow::Clocks;
use crate::warp::{Group, Wait, Warp};

impl Cluster<'_, '_, '_> {
    /// Runs every warp until all have returned.
    pub(crate) fn run(mut self) -> Result<(), Fault> {
        loop {
            let mut ran = false;
            for warp in 0..self.warps.len() {
                ran |= self.run_warp(warp)?;
            }
            if self.warps.iter().all(Warp::is_empty) {
                return self.finish();
            }
            if !ran && !self.open_barriers()? && !self.land() {
                return Err(self.deadlock());
            }
        }
    }

    /// The fault of a deadlock. A thread that waits for a phase is reported first, then one that waits for lanes, then one at a
    /// barrier.
    fn deadlock(&self) -> Fault {
        let rank = |wait| match wait {
            Some(Wait::Phase { .. }) => 0,
            Some(Wait::Lanes) => 1,
            _ => 2,
        };
        let groups = self.warps.iter().enumerate().flat_map(|(warp, state)| state.groups.iter().map(move |group| (warp, group)));
        let (warp, group) = groups.min_by_key(|(_, group)| rank(group.waits)).expect("somebody waits");
        let first = |warp, group: &Group| self.position.thread(warp, group.lanes.trailing_zeros() as usize);
        let waiting = self.warps.iter().enumerate().filter_map(|(warp, state)| Some(first(warp, state.groups.first()?)));
        let (at, kind) = match group.waits {
            Some(Wait::Lanes) => (group.at, Kind::DivergedWarp),
            wait => {
                let at = if rank(wait) == 0 { group.at } else { group.at - 1 };
                (at, Kind::Deadlock { barrier: self.describe(wait), waiting: waiting.collect() })
            }
        };
        self.fault(warp, at, (group.lanes.trailing_zeros() as usize, kind))
    }

    /// All threads have returned: nothing may be in flight.
    fn finish(&self) -> Result<(), Fault> {
        let (last, fault) = (self.context.kernel.code.len() - 1, |reason: &str| Kind::Misuse(reason.into()));
        if !self.loads.is_empty() {
            return Err(self.fault(0, last, (0, fault("returns while a load is on its way"))));
        }
        if self.context.pending.is_some() && self.warps.iter().all(|warp| warp.waited == 0) {
            return Err(self.fault(0, last, (0, fault("returns without having waited for the launch before"))));
        }
        let Some(thread) = self.stores.iter().position(|stores| !stores.is_empty()) else { return Ok(()) };
        Err(self.fault(thread / WARP, last, (thread % WARP, fault("returns before what it stores was read"))))
    }

    fn describe(&self, wait: Option<Wait>) -> String {
        match wait {
            Some(Wait::Phase { block, barrier, parity }) => self.block_states[block].barriers.describe(barrier, parity),
            Some(Wait::Barrier { number, threads: None }) => format!("barrier {number}, for all threads"),
            Some(Wait::Barrier { number, threads: Some(threads) }) => format!("barrier {number}, for {threads} threads"),
            Some(Wait::Cluster | Wait::Lanes) | None => "the barrier of the cluster".into(),
        }
    }

    fn fault(&self, warp: usize, at: usize, (lane, kind): (usize, Kind)) -> Fault {
        let (kernel, (block, thread)) = (self.context.kernel, self.position.thread(warp, lane));
        Fault { kernel: kernel.name.clone(), line: kernel.code[at].line, block, thread, kind }
    }

    /// Runs a warp until every lane has returned or waits. Returns true if any lane ran.
    fn run_warp(&mut self, warp: usize) -> Result<bool, Fault> {
        let (kernel, mut ran) = (self.context.kernel, false);
        loop {
            let Some(group) = self.warps[warp].take_hindmost() else {
                if self.wake(warp) {
                    continue;
                }
                return Ok(ran);
            };
            ran = true;
            let Some(instruction) = kernel.code.get(group.at) else { continue };
            let step = self.step(warp, group.at, group.lanes, instruction);
            step.map_err(|fault| self.fault(warp, group.at, fault))?;
        }
    }

    /// Resumes groups whose phase has ended. Returns true if there are any.
    fn wake(&mut self, warp: usize) -> bool {
        let (mut woken, Self { block_states, warps, position, .. }) = (false, self);
        for i in 0..warps[warp].groups.len() {
            let Group { waits: Some(Wait::Phase { block, barrier, parity }), lanes, .. } = warps[warp].groups[i] else {
                continue;
            };
            let now = position.moment(&warps[warp], warp, lanes.trailing_zeros() as usize);
            if !matches!(block_states[block].barriers.ended(barrier, parity, now), Ok(None)) {
                warps[warp].groups[i].waits = None;
                woken = true;
            }
        }
        woken
    }

    /// Resumes warps at barriers that all threads have reached. Returns true if there are any.
    fn open_barriers(&mut self) -> Result<bool, Fault> {
        let mut waiting: BTreeMap<(usize, u32), Vec<usize>> = BTreeMap::new();
        let (mut opened, all) = (false, 0..self.warps.len());
        for warp in all.clone() {
            if let [Group { waits: Some(Wait::Barrier { number, .. }), .. }] = self.warps[warp].groups[..] {
                waiting.entry((self.position.rank(warp), number)).or_default().push(warp);
            }
        }
        for ((rank, _), warps) in waiting {
            let Group { at, waits, .. } = self.warps[warps[0]].groups[0];
            let Some(Wait::Barrier { threads, .. }) = waits else { continue };
            // A barrier for all threads must be reached at one instruction, as CUDA requires for __syncthreads; one for a number
            // of threads need not.
            let strays = |group: Group| group.waits != waits || threads.is_none() && group.at != at;
            if let Some(&warp) = warps.iter().find(|&&warp| strays(self.warps[warp].groups[0])) {
                return Err(self.fault(warp, self.warps[warp].groups[0].at - 1, whole_warp(Kind::DivergedBarrier)));
            }
            let living = all.clone().filter(|&warp| self.position.rank(warp) == rank && !self.warps[warp].is_empty()).count();
            if warps.len() >= threads.map_or(living, |threads| threads as usize / WARP) {
                self.synchronize(&warps);
                opened = true;
            }
        }
        let living = || self.warps.iter().filter(|warp| !warp.is_empty());
        if living().all(|warp| warp.arrived_in_cluster) && living().any(|warp| warp.groups[0].waits == Some(Wait::Cluster)) {
            let warps: Vec<usize> = all.filter(|&warp| !self.warps[warp].is_empty()).collect();
            warps.iter().for_each(|&warp| self.warps[warp].arrived_in_cluster = false);
            self.synchronize(&warps);
            opened = true;
        }
        Ok(opened)
    }

    /// Joins the clocks of these warps, and resumes them.
    fn synchronize(&mut self, warps: &[usize]) {
        let mut clocks = Clocks::default();
        warps.iter().for_each(|&warp| clocks.join(&self.warps[warp].clocks));
        for &warp in warps {
            self.warps[warp].clocks = clocks.clone();
            self.warps[warp].groups.iter_mut().for_each(|group| group.waits = None);
            self.release(warp, true);
        }
    }
}
