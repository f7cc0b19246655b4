//! Wall time of each phase of an attempt, in order, with an event when one begins.

use std::time::Instant;

use crate::event::{Event, Events};

/// The phases so far.
#[derive(Debug)]
pub struct Phases {
    events: Events,
    done: Vec<(String, u64)>,
    current: Option<(&'static str, Instant)>,
}

impl Phases {
    /// No phase yet.
    #[must_use]
    pub fn new(events: Events) -> Self {
        Self {
            events,
            done: Vec::new(),
            current: None,
        }
    }

    /// Ends the current phase and begins this one.
    pub async fn begin(&mut self, name: &'static str) {
        self.end();
        self.current = Some((name, Instant::now()));
        self.events.tell(Event::Phase { name }).await;
    }

    /// Ends the current phase.
    pub fn end(&mut self) {
        if let Some((name, since)) = self.current.take() {
            self.add(name, since.elapsed());
        }
    }

    /// Takes time off the current phase and books it as another (a push inside a build).
    pub fn split(&mut self, name: &'static str, seconds: f64) {
        let ms = std::time::Duration::from_secs_f64(seconds.clamp(0.0, 1e6));
        if let Some((_, since)) = &mut self.current {
            *since = since.checked_add(ms.min(since.elapsed())).unwrap_or(*since);
        }
        self.end();
        self.add(name, ms);
    }

    fn add(&mut self, name: &str, time: std::time::Duration) {
        self.done.push((
            name.to_owned(),
            u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
        ));
    }

    /// All phases, the current one ended.
    #[must_use]
    pub fn finish(mut self) -> Vec<(String, u64)> {
        self.end();
        self.done
    }
}
