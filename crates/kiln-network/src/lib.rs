//! Egress gateway of a machine: policy, resolve, floor, dial, SNI and Host checks; registry discovery.
