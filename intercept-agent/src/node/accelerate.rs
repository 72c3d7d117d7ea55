//! Joins the connections of a pod past TCP. A failure here never fails the capture.

use std::os::fd::AsFd as _;

use intercept_common::{acceleration::PodCell, layout::PodPolicy, names};

use super::{Node, Target, links::replace_pin};
use crate::{
    acceleration::{Acceleration, AccelerationError, Owners, self_test},
    ids::{NetnsCookie, Slot},
    listeners,
    options::Config,
    programs,
    sys::{self, LinkTarget},
};

/// The cell of a pod.
fn cell(netns: NetnsCookie, slot: Slot) -> PodCell {
    PodCell { netns, slot, reserved: 0 }
}

impl Node {
    /// Whether it is known if this kernel joins connections. If not, starts the self-test, which takes longer than an
    /// attach.
    pub fn can_accelerate_at_once(&self) -> bool {
        Acceleration::is_loaded(&self.store) || self_test::has_ended()
    }

    /// Starts or stops joining as the active policy says. What is already right is left unchanged.
    pub(super) fn accelerate(&mut self, target: &Target, config: &Config, policy: &PodPolicy) {
        let cookie = target.netns.cookie();
        let done = if config.accelerate.is_empty() || config.shadow {
            self.stop_accelerating(cookie, policy.slot)
        } else {
            self.start_accelerating(target, config, policy)
        };
        if let Err(error) = done {
            tracing::warn!(
                cookie = cookie.0,
                error = &error as &dyn std::error::Error,
                "the pod is captured, but its connections are not joined"
            );
        }
    }

    fn start_accelerating(
        &mut self,
        target: &Target,
        config: &Config,
        policy: &PodPolicy,
    ) -> Result<(), AccelerationError> {
        let pod = cell(target.netns.cookie(), policy.slot);
        let mut acceleration = Acceleration::load(&self.store)?;
        self.link_join(target)?;
        acceleration.allow(pod, config)?;
        // The callback missed listeners that opened before the cell was set.
        let Ok(found) = listeners::find(&target.netns, &[&target.cgroup], &[config.inbound_port]) else {
            // The listeners were just read, and the callback sees later ones.
            return Ok(());
        };
        let owners = Owners {
            uids: &policy.uids[..usize::from(policy.uid_count).min(policy.uids.len())],
            gids: &policy.gids[..usize::from(policy.gid_count).min(policy.gids.len())],
        };
        acceleration.adopt(pod, config, owners, &found.listeners)
    }

    fn link_join(&self, target: &Target) -> Result<(), AccelerationError> {
        let name = names::JOIN_OPS;
        let path = self.store.pod(target.netns.cookie()).join(name);
        if self.link_is(&path, LinkTarget::Cgroup(Some(target.cgroup.id()))).unwrap_or(false) {
            return Ok(());
        }
        sys::open_pin(&self.store.programs().join(name))
            .and_then(|program| {
                sys::link_create(program.as_fd(), target.cgroup.as_fd(), programs::attach_type(name))
            })
            .and_then(|link| replace_pin(&link, &path))
            .map_err(|source| AccelerationError::Call { action: "attaching program", name, source })
    }

    /// Stops joining. From the next message on, joined connections use TCP.
    pub(super) fn stop_accelerating(&self, cookie: NetnsCookie, slot: Slot) -> Result<(), AccelerationError> {
        let Some(mut acceleration) = Acceleration::find(&self.store)? else { return Ok(()) };
        acceleration.revoke(cell(cookie, slot))?;
        let path = self.store.pod(cookie).join(names::JOIN_OPS);
        if let Ok(link) = sys::open_pin(&path) {
            // Without its pin the kernel frees it a little later.
            let _goes_with_its_pin = sys::link_detach(link.as_fd());
            std::fs::remove_file(&path).map_err(|source| AccelerationError::Call {
                action: "removing the link of program",
                name: names::JOIN_OPS,
                source,
            })?;
        }
        acceleration.withdraw_offers(cell(cookie, slot))
    }

    /// Replaces the programs of an accelerated pod with this build's. If they cannot be loaded, the pod is no longer
    /// accelerated.
    pub(super) fn replace_join(&self, cookie: NetnsCookie) {
        let name = names::JOIN_OPS;
        let Ok(link) = sys::open_pin(&self.store.pod(cookie).join(name)) else { return };
        let replaced = Acceleration::load(&self.store).and_then(|_loaded| {
            sys::open_pin(&self.store.programs().join(name))
                .and_then(|program| sys::link_update(link.as_fd(), program.as_fd()))
                .map_err(|source| AccelerationError::Call { action: "replacing program", name, source })
        });
        if let Err(error) = replaced {
            tracing::warn!(
                cookie = cookie.0,
                error = &error as &dyn std::error::Error,
                "connections are no longer joined"
            );
            if let Ok(Some(policy)) = self.maps.policy(cookie) {
                let _reported = self.stop_accelerating(cookie, policy.slot);
            }
        }
    }

    /// Returns every joined connection to TCP. Their sockets keep programs and maps alive after the pins are removed.
    pub(super) fn switch_joining_off(&self) {
        let off = Acceleration::find(&self.store).and_then(|found| match found {
            Some(mut acceleration) => acceleration.deactivate(),
            None => Ok(()),
        });
        if let Err(error) = off {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "joined connections stay joined until they close"
            );
        }
    }

    /// The maps of joined connections, and a pod's cell in them.
    pub fn acceleration(
        &self,
        cookie: NetnsCookie,
        slot: Slot,
    ) -> Result<Option<(Acceleration, PodCell)>, AccelerationError> {
        Ok(Acceleration::find(&self.store)?.map(|found| (found, cell(cookie, slot))))
    }
}
