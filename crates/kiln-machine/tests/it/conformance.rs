//! The conformance suite: the same cases for every driver. A new driver is one line at the end of this file.

pub(crate) mod crash;
pub(crate) mod under_test;

mod channel;
mod clones;
mod disks;
mod ends;
pub(crate) mod kept;
mod pins;

/// One test per case and driver, named `conformance::<driver>::<case>`. A driver that this host cannot test says so once per case and
/// passes, unless the environment requires it.
macro_rules! conformance {
    ($driver:ident: $cases:tt) => {
        mod $driver {
            use super::under_test::UnderTest;
            conformance!(@cases $driver $cases);
        }
    };
    (@cases $driver:ident [$($case:ident = $path:path,)*]) => {
        $(
            #[test]
            fn $case() {
                if let Some(under_test) = UnderTest::$driver() {
                    under_test.run(|test| Box::pin($path(test)));
                }
            }
        )*
    };
}

macro_rules! for_drivers {
    ($($driver:ident),*) => {
        $(conformance!($driver: [
            boot_cold = super::ends::boot_cold,
            refused_before_side_effects = super::ends::refused_before_side_effects,
            one_machine_per_name = super::ends::one_machine_per_name,
            guest_panic = super::ends::guest_panic,
            guest_silent = super::ends::guest_silent,
            vmm_killed = super::ends::vmm_killed,
            stop_with_deadline = super::ends::stop_with_deadline,
            destroy_leaves_nothing = super::ends::destroy_leaves_nothing,
            memory_limit = super::ends::memory_limit,
            clone_identity = super::clones::clone_identity,
            nothing_runs_before_thaw = super::clones::nothing_runs_before_thaw,
            template_disks_are_frozen_with_it = super::clones::template_disks_are_frozen_with_it,
            a_template_of_other_files_is_stale = super::clones::a_template_of_other_files_is_stale,
            damaged_template_is_removed = super::clones::damaged_template_is_removed,
            root_is_read_only_and_shared = super::disks::root_is_read_only_and_shared,
            fork_persists_nothing_unless_taken = super::disks::fork_persists_nothing_unless_taken,
            scratch_is_new_each_time = super::disks::scratch_is_new_each_time,
            hot_plug = super::disks::hot_plug,
            flood_and_stuck_reader = super::channel::flood_and_stuck_reader,
            half_close = super::channel::half_close,
            host_replaced_mid_output = super::channel::host_replaced_mid_output,
            vmm_killed_while_saved = super::crash::vmm_killed_while_saved,
            reap_after_kill_9 = super::crash::reap_after_kill_9,
            kept_survives_its_owner = super::kept::kept_survives_its_owner,
            one_of_many_adopters_wins = super::kept::one_of_many_adopters_wins,
            kept_until_its_time_is_over = super::kept::kept_until_its_time_is_over,
            adoption_is_refused_by_reason = super::kept::adoption_is_refused_by_reason,
            not_kept_before_it_is_ready = super::kept::not_kept_before_it_is_ready,
            adoption_given_up_changes_nothing = super::kept::adoption_given_up_changes_nothing,
            whole_cpus = super::pins::whole_cpus,
        ]);)*
    };
}

for_drivers!(sim, qemu);
