//! The output of a command on its way to whoever watches and into its log: each of its two streams masked by itself, so that neither hides what the other
//! cuts apart.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::command::Room;
use crate::failure::Failure;
use crate::fleet::mask::{Mask, MaskedStream};
use crate::joblog::JobLog;

/// Standard output and standard error of one command.
pub(super) struct Shown {
    /// In the order of their numbers, 1 and 2.
    streams: [MaskedStream; 2],
    output: mpsc::Sender<(u8, Vec<u8>)>,
    log: Arc<JobLog>,
}

impl Shown {
    /// For one command.
    pub(super) fn new(mask: &Mask, output: mpsc::Sender<(u8, Vec<u8>)>, log: Arc<JobLog>) -> Self {
        Self {
            streams: [mask.stream(), mask.stream()],
            output,
            log,
        }
    }

    /// Passes output on until there is no more, or no more room for it.
    ///
    /// # Errors
    /// When the command wrote more than it may.
    pub(super) async fn relay(
        mut self,
        mut chunks: mpsc::Receiver<(u8, Vec<u8>)>,
        room: &mut Room,
    ) -> Result<(), Failure> {
        loop {
            let until = self.streams.iter().filter_map(MaskedStream::held_until);
            let until = until.min();
            let held_long_enough = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            let chunk = tokio::select! {
                chunk = chunks.recv() => chunk,
                () = held_long_enough => {
                    self.each(MaskedStream::let_go).await;
                    continue;
                }
            };
            let Some((stream, mut bytes)) = chunk else {
                self.each(MaskedStream::finish).await;
                return Ok(());
            };
            let fits = room.take(&mut bytes);
            let masked = self.streams[usize::from(stream != 1)].push(&bytes);
            self.tell(stream, masked).await;
            fits?;
        }
    }

    async fn each(&mut self, take: fn(&mut MaskedStream) -> Vec<u8>) {
        for stream in [1, 2] {
            let bytes = take(&mut self.streams[usize::from(stream != 1)]);
            self.tell(stream, bytes).await;
        }
    }

    async fn tell(&self, stream: u8, bytes: Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        self.log.masked(&bytes);
        let _reader_gone = self.output.send((stream, bytes)).await;
    }
}

impl Drop for Shown {
    /// A command that was stopped has written its last words, too.
    fn drop(&mut self) {
        for (stream, masked) in (1..).zip(&mut self.streams) {
            let rest = masked.finish();
            if !rest.is_empty() {
                self.log.masked(&rest);
                let _slow_or_gone = self.output.try_send((stream, rest));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::fleet::mask::HELD_MAX;
    use crate::fleet::spool::Spool;

    struct Scene {
        chunks: mpsc::Sender<(u8, Vec<u8>)>,
        output: mpsc::Receiver<(u8, Vec<u8>)>,
        spool: Arc<Spool>,
        relay: tokio::task::JoinHandle<Result<(), Failure>>,
        _dir: tempfile::TempDir,
    }

    impl Scene {
        fn begin(most: Option<u64>) -> Self {
            let dir = tempfile::tempdir().expect("temp dir");
            let spool = Arc::new(Spool::create(&dir.path().join("log")).expect("a spool"));
            let mask = Mask::new([&b"hunter2"[..]]);
            let log = Arc::new(JobLog::new(Arc::clone(&spool), &mask));
            let (sender, output) = mpsc::channel(8);
            let (chunks, receiver) = mpsc::channel(8);
            let shown = Shown::new(&mask, sender, log);
            let mut room = Room::of(most);
            let relay = tokio::spawn(async move { shown.relay(receiver, &mut room).await });
            Self {
                chunks,
                output,
                spool,
                relay,
                _dir: dir,
            }
        }

        async fn write(&self, stream: u8, bytes: &[u8]) {
            let sent = self.chunks.send((stream, bytes.to_vec())).await;
            sent.expect("it is read");
        }

        async fn reads(&mut self, stream: u8, text: &str) {
            let (from, bytes) = self.output.recv().await.expect("output");
            assert_eq!((from, &*String::from_utf8_lossy(&bytes)), (stream, text));
        }

        fn log(&self) -> String {
            String::from_utf8(self.spool.read(0, 1000).expect("read")).expect("text")
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_watcher_sees_no_secret_and_waits_for_no_prompt() {
        let mut scene = Scene::begin(None);
        let since = Instant::now();
        scene.write(1, b"key hunt").await;
        scene.reads(1, "key ").await;
        // The other stream neither waits nor cuts it apart.
        scene.write(2, b"note\n").await;
        scene.reads(2, "note\n").await;
        scene.write(1, b"er2 ").await;
        scene.reads(1, "*** ").await;
        assert_eq!(since.elapsed().as_millis(), 0);
        scene.write(2, b"how? h").await;
        scene.reads(2, "how? ").await;
        scene.reads(2, "h").await;
        assert_eq!(since.elapsed(), HELD_MAX);
        assert_eq!(scene.log(), "key note\n*** how? h");
        drop(scene.chunks);
        assert!(scene.output.recv().await.is_none());
        scene.relay.await.expect("ends").expect("fits");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_held_when_a_command_is_stopped_is_told() {
        let mut scene = Scene::begin(None);
        scene.write(1, b"last hunt").await;
        scene.reads(1, "last ").await;
        scene.relay.abort();
        scene.reads(1, "hunt").await;
        assert!(scene.output.recv().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_fit_is_cut_before_it_is_masked() {
        let mut scene = Scene::begin(Some(10));
        scene.write(1, b"key hunter2 and more").await;
        scene.reads(1, "key ").await;
        scene.reads(1, "hunter").await;
        let over = scene.relay.await.expect("ends").expect_err("too much");
        assert!(over.message.contains("output_limit"));
    }
}
