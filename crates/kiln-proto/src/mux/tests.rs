//! Properties of the state machine: honest peers never offend each other, hostile ones never
//! make it grow.

use super::*;
use crate::frame::FrameBuffer;
use proptest::prelude::*;

/// One handle, and how far its two directions got.
struct Handle {
    id: u32,
    written: u64,
    read: u64,
}

struct Side {
    mux: Mux,
    handles: Vec<Handle>,
    /// Bytes sent and not yet delivered.
    wire: VecDeque<u8>,
    input: FrameBuffer,
}

impl Side {
    fn new(role: Role) -> Self {
        let limits = SessionLimits {
            streams_max: 6,
            accept_backlog: 3,
            ..SessionLimits::default()
        };
        Self {
            mux: Mux::new(role, limits),
            handles: Vec::new(),
            wire: VecDeque::new(),
            input: FrameBuffer::new(0),
        }
    }

    fn role(&self) -> Role {
        self.mux.role
    }

    fn fill(&mut self) {
        let mut out = Vec::new();
        self.mux.fill(&mut out);
        self.wire.extend(out);
    }

    fn check(&self) {
        let open = |inbound| {
            self.mux
                .streams
                .values()
                .filter(move |entry| entry.counted && entry.inbound == inbound)
        };
        assert_eq!(open(true).count(), self.mux.inbound_open);
        assert_eq!(open(false).count(), self.mux.outbound_open);
        let handles = self
            .mux
            .streams
            .values()
            .filter(|entry| entry.handle && entry.inbound)
            .count();
        assert_eq!(handles, self.mux.inbound_handles);
        assert!(handles <= self.mux.limits.streams_max);
        for entry in self.mux.streams.values() {
            assert!(entry.recv.len() <= WINDOW as usize && entry.send.len() <= SEND_BUFFER);
            let granted = u64::from(entry.recv_credit) + u64::from(entry.consumed);
            assert!(granted + entry.recv.len() as u64 <= u64::from(WINDOW));
        }
    }
}

/// The byte at `offset` of what `writer` writes to stream `id`.
fn byte_at(id: u32, writer: Role, offset: u64) -> u8 {
    let mixed = u64::from(id) * 31 + offset * 7 + (offset >> 8) + (writer == Role::Host) as u64;
    mixed as u8
}

#[derive(Debug, Clone)]
enum Step {
    Open,
    Take,
    Write(usize, usize),
    Read(usize, usize),
    Shutdown(usize),
    Drop(usize),
    Reset(usize),
    Fill,
    Deliver(usize),
}

fn any_step() -> impl Strategy<Value = Step> {
    let pick = 0usize..6;
    prop_oneof![
        2 => Just(Step::Open),
        2 => Just(Step::Take),
        6 => (pick.clone(), 1usize..200_000).prop_map(|(pick, len)| Step::Write(pick, len)),
        6 => (pick.clone(), 1usize..200_000).prop_map(|(pick, len)| Step::Read(pick, len)),
        1 => pick.clone().prop_map(Step::Shutdown),
        1 => pick.clone().prop_map(Step::Drop),
        1 => pick.prop_map(Step::Reset),
        8 => Just(Step::Fill),
        8 => (1usize..150_000).prop_map(Step::Deliver),
    ]
}

fn write(side: &mut Side, pick: usize, len: usize) {
    let role = side.role();
    let Some(handle) = side.handles.get_mut(pick) else {
        return;
    };
    let end = handle.written + len as u64;
    let bytes: Vec<u8> = (handle.written..end)
        .map(|at| byte_at(handle.id, role, at))
        .collect();
    let parts = bytes.chunks(len.div_ceil(2));
    if let Ok(Some(count)) = side.mux.write(handle.id, Waker::noop(), parts) {
        handle.written += count as u64;
    }
}

fn read(side: &mut Side, pick: usize, len: usize) -> bool {
    let writer = if side.role() == Role::Host {
        Role::Guest
    } else {
        Role::Host
    };
    let Some(handle) = side.handles.get_mut(pick) else {
        return false;
    };
    let (id, start) = (handle.id, handle.read);
    let sink = |bytes: &[u8]| {
        for byte in bytes {
            assert_eq!(*byte, byte_at(id, writer, handle.read), "stream {id}");
            handle.read += 1;
        }
    };
    let _ = side.mux.read(id, Waker::noop(), len, sink);
    handle.read > start
}

fn deliver(from: &mut Side, to: &mut Side, most: usize) -> bool {
    let count = most.min(from.wire.len());
    let bytes: Vec<u8> = from.wire.drain(..count).collect();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let taken = to.input.push(rest);
        rest = &rest[taken..];
        while let Some(frame) = to.input.next_frame().unwrap() {
            to.mux
                .on_frame(frame)
                .expect("an honest peer never offends");
        }
    }
    count > 0
}

fn run(step: &Step, side: &mut Side, other: &mut Side) {
    match *step {
        Step::Open => {
            if let Ok(id) = side.mux.open(1, &Bytes::new()) {
                side.handles.push(Handle {
                    id,
                    written: 0,
                    read: 0,
                });
            }
        }
        Step::Take => {
            if let Some(waiting) = side.mux.take_waiting(Waker::noop()) {
                side.handles.push(Handle {
                    id: waiting.stream,
                    written: 0,
                    read: 0,
                });
            }
        }
        Step::Write(pick, len) => write(side, pick, len),
        Step::Read(pick, len) => {
            read(side, pick, len);
        }
        Step::Shutdown(pick) => {
            if let Some(handle) = side.handles.get(pick) {
                let _ = side.mux.shutdown(handle.id, Waker::noop());
            }
        }
        Step::Drop(pick) | Step::Reset(pick) => {
            if pick < side.handles.len() {
                let handle = side.handles.remove(pick);
                let reset = matches!(step, Step::Reset(_)).then_some((20, "why"));
                side.mux.abandon(handle.id, reset);
            }
        }
        Step::Fill => side.fill(),
        Step::Deliver(most) => {
            deliver(side, other, most);
        }
    }
    side.check();
    other.check();
}

/// Lets everything arrive and reads it.
fn settle_all(host: &mut Side, guest: &mut Side) {
    loop {
        let mut moved = false;
        host.fill();
        guest.fill();
        moved |= deliver(host, guest, usize::MAX);
        moved |= deliver(guest, host, usize::MAX);
        for side in [&mut *host, &mut *guest] {
            for pick in 0..side.handles.len() {
                moved |= read(side, pick, usize::MAX);
            }
        }
        if !moved {
            return;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn honest_peers_never_offend_and_bytes_arrive_in_order(
        steps in prop::collection::vec((any::<bool>(), any_step()), 0..160),
    ) {
        let (mut host, mut guest) = (Side::new(Role::Host), Side::new(Role::Guest));
        for (at_host, step) in &steps {
            if *at_host {
                run(step, &mut host, &mut guest);
            } else {
                run(step, &mut guest, &mut host);
            }
        }
        settle_all(&mut host, &mut guest);
        for (reader, writer) in [(&host, &guest), (&guest, &host)] {
            for handle in &reader.handles {
                let other = writer.handles.iter().find(|other| other.id == handle.id);
                if let Some(other) = other {
                    prop_assert_eq!(handle.read, other.written);
                }
            }
        }
        for side in [&mut host, &mut guest] {
            let ids: Vec<u32> = side.handles.drain(..).map(|handle| handle.id).collect();
            for id in ids {
                side.mux.abandon(id, None);
            }
            side.mux.refuse_incoming();
        }
        settle_all(&mut host, &mut guest);
        for side in [&host, &guest] {
            prop_assert!(side.mux.streams.is_empty(), "nothing stays: {:?}", side.mux.streams);
            prop_assert_eq!((side.mux.inbound_open, side.mux.outbound_open), (0, 0));
        }
    }

    #[test]
    fn hostile_frames_never_panic_and_never_exceed_the_bounds(
        frames in prop::collection::vec((0u8..10, 0u32..12, 0u32..WINDOW * 2), 0..300),
    ) {
        let mut side = Side::new(Role::Host);
        for _ in 0..3 {
            side.mux.open(1, &Bytes::new()).unwrap();
        }
        side.mux.ping().unwrap();
        let body = vec![0; DATA_LEN_MAX];
        for (kind, stream, amount) in frames {
            let bytes = &body[..1 + amount as usize % DATA_LEN_MAX];
            let frame = match kind {
                0 => Frame::Open { stream, kind: 1, payload: b"p" },
                1..=3 => Frame::Data { stream, bytes },
                4 => Frame::Credit { stream, bytes: amount + 1 },
                5 => Frame::Eof { stream },
                6 => Frame::Reset { stream, code: 1, reason: "r" },
                7 => Frame::Ping(u64::from(amount)),
                8 => Frame::Pong(u64::from(stream)),
                _ => Frame::Close { code: 1, reason: "r" },
            };
            // Later frames are shown too, as if the verdict had been ignored.
            let _ = side.mux.on_frame(frame);
            side.check();
            prop_assert!(side.mux.pongs.len() <= PINGS_MAX);
            prop_assert!(side.mux.backlog.len() <= side.mux.limits.accept_backlog);
        }
    }
}

#[test]
fn streams_take_turns() {
    let mut side = Side::new(Role::Host);
    let ids: Vec<u32> = (0..3)
        .map(|_| side.mux.open(1, &Bytes::new()).unwrap())
        .collect();
    let bytes = vec![1; SEND_BUFFER];
    for id in &ids {
        side.mux
            .write(*id, Waker::noop(), std::iter::once(&bytes[..]))
            .unwrap();
    }
    let mut order = Vec::new();
    loop {
        let mut out = Vec::new();
        side.mux.fill(&mut out);
        if out.is_empty() {
            break;
        }
        assert!(out.len() <= BATCH_TARGET + crate::frame::FRAME_SPAN_MAX);
        let mut rest = &out[..];
        while let Some((frame, taken)) = Frame::decode(rest).unwrap() {
            if let Frame::Data { stream, .. } = frame {
                order.push(stream);
            }
            rest = &rest[taken..];
        }
    }
    assert_eq!(order[..6], [1, 3, 5, 1, 3, 5]);
}

#[test]
fn stream_ids_run_out_without_wrapping() {
    let mut side = Side::new(Role::Host);
    side.mux.next_local = u32::MAX;
    assert_eq!(side.mux.open(1, &Bytes::new()), Ok(u32::MAX));
    assert_eq!(side.mux.open(1, &Bytes::new()), Err(OpenRefusal::Exhausted));
    side.mux
        .on_frame(Frame::Data {
            stream: u32::MAX,
            bytes: b"x",
        })
        .unwrap();
}

#[test]
fn opens_and_pings_wait_for_a_bounded_queue() {
    let mut side = Side::new(Role::Host);
    side.mux.limits.control_max = 2;
    side.mux.open(1, &Bytes::new()).unwrap();
    side.mux.ping().unwrap();
    assert_eq!(side.mux.open(1, &Bytes::new()), Err(OpenRefusal::QueueFull));
    assert!(side.mux.ping().is_none());
    side.fill();
    assert!(side.mux.open(1, &Bytes::new()).is_ok());
}
