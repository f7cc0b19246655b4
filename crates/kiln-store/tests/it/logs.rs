//! Logs as writers, followers and operators meet them.

use std::io::{BufRead as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures_util::StreamExt as _;
use kiln_store::logs::load::line_to_follower;
use kiln_store::logs::{LogConfig, LogError, LogKey, LogKeys, LogName, LogStore, RetentionClass};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

const DAY_MS: u64 = 24 * 60 * 60 * 1000;
const HOT: RetentionClass = RetentionClass::Hot;

pub(crate) fn name(job: &str) -> LogName {
    LogName::new("local".parse().unwrap(), job.parse().unwrap(), 1)
}

/// Line `n` of what a build prints, in these tests.
fn line(n: usize) -> String {
    format!("#{n} step {} of the build prints this\n", n % 7)
}

pub(crate) fn lines(range: std::ops::Range<usize>) -> String {
    range.map(line).collect()
}

pub(crate) async fn all(store: &LogStore, name: &LogName) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    loop {
        let bytes = store.read(name, out.len() as u64, usize::MAX).await?;
        if bytes.is_empty() {
            return Ok(out);
        }
        out.extend_from_slice(&bytes);
    }
}

pub(crate) async fn followed(store: &LogStore, name: &LogName, offset: u64) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut stream = std::pin::pin!(store.follow(name, offset));
    while let Some(bytes) = stream.next().await {
        out.extend_from_slice(&bytes?);
    }
    Ok(out)
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn repeats_are_ignored_and_gaps_are_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = LogStore::open(LogConfig::in_folder(dir.path())).await?;
    let b1 = name("b1");
    assert!(matches!(
        store.read(&b1, 0, 9).await,
        Err(LogError::NotFound { .. })
    ));
    assert_eq!(store.append(&b1, 0, "hello ".into()).await?.next, 6);
    assert_eq!(store.append(&b1, 0, "hello ".into()).await?.next, 6);
    let gap = store.append(&b1, 9, "x".into()).await;
    assert!(
        matches!(
            gap,
            Err(LogError::Gap {
                wanted: 6,
                given: 9
            })
        ),
        "{gap:?}"
    );
    // The second half of this is new.
    assert_eq!(store.append(&b1, 3, "lo world".into()).await?.next, 11);
    assert_eq!(all(&store, &b1).await?, b"hello world");
    assert_eq!(store.read(&b1, 4, 3).await?, "o w");
    let ended = store.end(&b1, HOT, 0).await?;
    assert!(ended.archived && ended.ended && !ended.truncated);
    assert_eq!(store.append(&b1, 6, "world".into()).await?.next, 11);
    assert!(matches!(
        store.append(&b1, 11, "!".into()).await,
        Err(LogError::Ended { end: 11, .. })
    ));
    assert_eq!(all(&store, &b1).await?, b"hello world");
    assert_eq!(store.read(&b1, 4, 3).await?, "o w");
    assert_eq!(store.end(&b1, HOT, 5).await?, ended);
    assert!(store.unarchived().await?.is_empty());
    Ok(())
}

#[test]
fn whatever_a_writer_repeats_the_log_is_what_was_said() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let text = lines(0..40);
    let pieces = prop::collection::vec((0..1500_usize, 0..400_usize), 1..30);
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(24)
    };
    TestRunner::new(config)
        .run(&(pieces, any::<bool>()), |(pieces, again)| {
            runtime.block_on(async {
                let dir = tempfile::tempdir().unwrap();
                let open = || LogStore::open(LogConfig::in_folder(dir.path()));
                let mut store = open().await.unwrap();
                let b1 = name("b1");
                let mut end = 0;
                for (at, len) in pieces {
                    let at = at.min(text.len());
                    let piece =
                        Bytes::copy_from_slice(&text.as_bytes()[at..text.len().min(at + len)]);
                    let stop = at + piece.len();
                    match store.append(&b1, at as u64, piece).await {
                        Ok(answer) => {
                            assert!(at <= end);
                            end = end.max(stop);
                            assert_eq!(answer.next, end as u64);
                        }
                        Err(LogError::Gap { wanted, .. }) => {
                            assert!(at > end);
                            assert_eq!(wanted, end as u64);
                        }
                        Err(error) => panic!("{error}"),
                    }
                    if again {
                        store = open().await.unwrap();
                    }
                }
                store.end(&b1, HOT, 0).await.unwrap();
                assert_eq!(all(&store, &b1).await.unwrap(), text.as_bytes()[..end]);
                assert_eq!(
                    followed(&store, &b1, 0).await.unwrap(),
                    text.as_bytes()[..end]
                );
            });
            Ok(())
        })
        .unwrap();
}

#[tokio::test]
async fn a_log_that_is_too_long_says_where_it_was_cut() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut config = LogConfig::in_folder(dir.path());
    config.bytes_max = 100;
    let store = LogStore::open(config.clone()).await?;
    let b1 = name("b1");
    let text = lines(0..10);
    let mut follower = std::pin::pin!(store.follow(&b1, 0));
    let mut seen = Vec::new();
    for at in (0..text.len()).step_by(30) {
        let piece = Bytes::copy_from_slice(&text.as_bytes()[at..text.len().min(at + 30)]);
        let stop = at + piece.len();
        let answer = store.append(&b1, at as u64, piece).await?;
        assert_eq!(answer.next, stop as u64);
        assert_eq!(answer.full, stop > 100, "{at}");
    }
    let status = store.status(&b1).await?.context("there")?;
    assert!(status.truncated);
    assert_eq!(status.dropped, text.len() as u64 - 100);
    drop(store);
    let store = LogStore::open(config).await?;
    // A writer that comes again after a restart is still told that it is full.
    let again = store.append(&b1, text.len() as u64, "more".into()).await?;
    assert!(again.full && again.next == text.len() as u64 + 4);
    store.end(&b1, HOT, 0).await?;
    let kept = String::from_utf8(all(&store, &b1).await?)?;
    assert!(kept.starts_with(&text[..100]), "{kept}");
    assert!(
        kept[100..].contains("truncated") && kept.ends_with("not kept]\n"),
        "{kept}"
    );
    let status = store.status(&b1).await?.context("there")?;
    assert_eq!(status.dropped, text.len() as u64 + 4 - 100);
    while seen.len() < 100 {
        seen.extend_from_slice(&follower.next().await.context("more")??);
    }
    assert_eq!(seen[..100], text.as_bytes()[..100]);
    Ok(())
}

#[tokio::test]
async fn a_file_cut_anywhere_keeps_its_whole_pieces() -> Result<()> {
    for key in [None, Some(LogKey::new([9; 32]))] {
        let dir = tempfile::tempdir()?;
        let mut config = LogConfig::in_folder(dir.path());
        config.keys = key.map_or_else(LogKeys::default, |key| LogKeys::new(key, []));
        let b1 = name("b1");
        let (mut ends, mut text) = (vec![0], String::new());
        {
            let store = LogStore::open(config.clone()).await?;
            for n in 0..4 {
                store.append(&b1, text.len() as u64, line(n).into()).await?;
                text.push_str(&line(n));
                ends.push(text.len());
            }
        }
        let file = files(&config.live).pop().context("a file")?;
        let whole = std::fs::read(&file)?;
        for cut in 0..=whole.len() {
            for entry in files(&config.live) {
                std::fs::remove_file(entry)?;
            }
            std::fs::write(&file, &whole[..cut])?;
            let store = LogStore::open(config.clone()).await?;
            let status = store.status(&b1).await?.context("there")?;
            let next = usize::try_from(status.next)?;
            ensure!(
                ends.contains(&next),
                "cut at {cut}: {next} is inside a piece"
            );
            ensure!(cut < whole.len() || next == text.len());
            assert_eq!(
                all(&store, &b1).await?,
                text.as_bytes()[..next],
                "cut at {cut}"
            );
            store
                .append(&b1, status.next, text[next..].to_owned().into())
                .await?;
            assert_eq!(all(&store, &b1).await?, text.as_bytes(), "cut at {cut}");
            if cut % 16 == 0 {
                drop(store);
                let store = LogStore::open(config.clone()).await?;
                assert_eq!(
                    all(&store, &b1).await?,
                    text.as_bytes(),
                    "again after {cut}"
                );
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn damage_in_the_middle_is_not_thrown_away_unseen() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let config = LogConfig::in_folder(dir.path());
    let b1 = name("b1");
    {
        let store = LogStore::open(config.clone()).await?;
        let mut at = 0;
        for n in 0..4 {
            at = store.append(&b1, at, line(n).into()).await?.next;
        }
    }
    let file = files(&config.live).pop().context("a file")?;
    let mut bytes = std::fs::read(&file)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, &bytes)?;
    let store = LogStore::open(config.clone()).await?;
    let kept = all(&store, &b1).await?;
    assert!(lines(0..4).as_bytes().starts_with(&kept) && kept.len() < lines(0..4).len());
    let aside = files(&config.live)
        .into_iter()
        .find(|f| f.extension().is_some_and(|e| e == "damaged"));
    assert_eq!(std::fs::read(aside.context("a copy")?)?, bytes);
    Ok(())
}

/// Not a test: what the next one kills. Appends lines and says on its output what was acknowledged.
#[test]
fn child_that_is_killed() {
    let order = PathBuf::from("log-child");
    if !order.exists() {
        return;
    }
    let root = std::fs::read_to_string(order).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let store = LogStore::open(LogConfig::in_folder(root.trim()))
            .await
            .unwrap();
        let b1 = name("b1");
        let status = store.status(&b1).await.unwrap();
        let (mut at, mut n) = (0, 0);
        while at < status.map_or(0, |status| status.next) {
            at += line(n).len() as u64;
            n += 1;
        }
        loop {
            at = store.append(&b1, at, line(n).into()).await.unwrap().next;
            n += 1;
            // In one piece, or not at all.
            let line = format!("acknowledged {at}\n");
            std::io::stderr().write_all(line.as_bytes()).unwrap();
        }
    });
}

#[tokio::test]
async fn a_kill_at_any_moment_loses_nothing_that_was_acknowledged() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let root = dir.path().join("logs");
    std::fs::write(dir.path().join("log-child"), root.display().to_string())?;
    let b1 = name("b1");
    let mut acknowledged = 0;
    for round in 0..8_u64 {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", "logs::child_that_is_killed", "--nocapture"])
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let said = std::io::BufReader::new(child.stderr.take().context("stderr")?);
        // Its life is as many acknowledgements long, so that no clock is in this.
        let mut left = 3 + round * 17;
        for text in said.lines() {
            let text = text?;
            if let Some(at) = text.strip_prefix("acknowledged ") {
                acknowledged = at.parse()?;
                left -= 1;
            }
            if left == 0 {
                child.kill()?;
            }
            left = left.max(1);
        }
        child.wait()?;
        let store = LogStore::open(LogConfig::in_folder(&root)).await?;
        let text = all(&store, &b1).await?;
        ensure!(
            text.len() as u64 >= acknowledged,
            "{} of {acknowledged}",
            text.len()
        );
        assert!(lines(0..text.len() / 30).as_bytes().starts_with(&text));
        assert_eq!(text.last(), Some(&b'\n'));
    }
    ensure!(
        acknowledged > 1000,
        "only {acknowledged} bytes were written"
    );
    Ok(())
}

#[tokio::test]
async fn a_follower_sees_all_of_it_wherever_the_log_is() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = LogStore::open(LogConfig::in_folder(dir.path())).await?;
    let b1 = name("b1");
    let follow = |offset: u64| {
        let (store, b1) = (store.clone(), b1.clone());
        tokio::spawn(async move { followed(&store, &b1, offset).await })
    };
    let before = follow(0);
    let far = follow(lines(0..3000).len() as u64);
    let text = lines(0..3000);
    let mut at = 0;
    let mut during = None;
    for piece in text.as_bytes().chunks(997) {
        at = store
            .append(&b1, at, Bytes::copy_from_slice(piece))
            .await?
            .next;
        if at > 50_000 && during.is_none() {
            during = Some(follow(10));
        }
    }
    // This one reads nothing until the log has moved.
    let mut slow = std::pin::pin!(store.follow(&b1, 0));
    let first = slow.next().await.context("bytes")??;
    store.end(&b1, HOT, 0).await?;
    let mut rest = first.to_vec();
    while let Some(bytes) = slow.next().await {
        rest.extend_from_slice(&bytes?);
    }
    assert_eq!(rest, text.as_bytes());
    assert_eq!(before.await??, text.as_bytes());
    assert_eq!(during.context("followed")?.await??, text.as_bytes()[10..]);
    assert!(far.await??.is_empty());
    assert_eq!(followed(&store, &b1, 77).await?, text.as_bytes()[77..]);
    // Nobody wrote to this one; its follower is not left waiting.
    let b2 = name("b2");
    let (store2, waits) = (store.clone(), b2.clone());
    let nothing = tokio::spawn(async move { followed(&store2, &waits, 0).await });
    tokio::task::yield_now().await;
    store.end(&b2, HOT, 0).await?;
    assert!(
        tokio::time::timeout(Duration::from_secs(10), nothing)
            .await???
            .is_empty()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_followers_see_a_line_at_once_and_a_slow_one_costs_nobody() -> Result<()> {
    const FOLLOWERS: usize = 1000;
    const LINES: usize = 20;
    let dir = tempfile::tempdir()?;
    let store = LogStore::open(LogConfig::in_folder(dir.path())).await?;
    let b1 = name("b1");
    // It listens and does not read on.
    let mut slow = Box::pin(store.follow(&b1, 0));
    assert!(futures_util::poll!(slow.next()).is_pending());
    let mut rounds = Vec::new();
    for mut took in line_to_follower(&store, &b1, FOLLOWERS, LINES).await? {
        assert_eq!(took.len(), FOLLOWERS);
        took.sort_unstable();
        rounds.push(took[FOLLOWERS * 99 / 100]);
    }
    rounds.sort_unstable();
    // The promise is 100 ms, which the bench measures; here it is only that none is forgotten until some later look.
    let p99 = rounds[LINES / 2];
    eprintln!(
        "line to follower, {FOLLOWERS} followers: p99 {p99:?}, worst of {LINES} lines {:?}",
        rounds[LINES - 1]
    );
    ensure!(p99 <= Duration::from_secs(5), "p99 is {p99:?}");
    let bytes = store.status(&b1).await?.context("there")?.bytes;
    let mut rest = 0;
    while rest < bytes {
        rest += slow.next().await.context("the rest")??.len() as u64;
    }
    Ok(())
}

#[tokio::test]
async fn a_sealed_log_shows_nothing_and_needs_its_key() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut config = LogConfig::in_folder(dir.path());
    config.keys = LogKeys::new(LogKey::new([5; 32]), []);
    let (b1, b2) = (name("b1"), name("b2"));
    let text = lines(0..2000);
    let store = LogStore::open(config.clone()).await?;
    for name in [&b1, &b2] {
        store.append(name, 0, text.clone().into()).await?;
    }
    store.end(&b1, HOT, 0).await?;
    assert_eq!(all(&store, &b1).await?, text.as_bytes());
    for file in files(dir.path()) {
        let bytes = std::fs::read(&file)?;
        let shows = bytes.windows(8).any(|window| window == b"of the b");
        ensure!(!shows, "{} shows the log", file.display());
    }
    let mut other = config.clone();
    other.keys = LogKeys::new(LogKey::new([6; 32]), []);
    let stranger = LogStore::open(other.clone()).await?;
    for name in [&b1, &b2] {
        let read = stranger.read(name, 0, 10).await;
        assert!(matches!(read, Err(LogError::Key { .. })), "{read:?}");
        let append = stranger.append(name, text.len() as u64, "x".into()).await;
        assert!(append.is_err());
    }
    // A rotated key: the old one still opens.
    other.keys = LogKeys::new(LogKey::new([6; 32]), [LogKey::new([5; 32])]);
    let rotated = LogStore::open(other).await?;
    rotated
        .append(&b2, text.len() as u64, "end\n".into())
        .await?;
    rotated.end(&b2, HOT, 0).await?;
    assert_eq!(
        all(&rotated, &b2).await?,
        [text.as_bytes(), b"end\n"].concat()
    );
    // A log under another name is not that log.
    let (from, to) = ("ended/logs/local/b1", "ended/logs/local/b9");
    std::fs::rename(dir.path().join(from), dir.path().join(to))?;
    let moved = rotated.read(&name("b9"), 0, 10).await;
    assert!(matches!(moved, Err(LogError::Damaged { .. })), "{moved:?}");
    Ok(())
}

#[tokio::test]
async fn a_job_that_goes_takes_the_logs_of_its_attempts_along() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = LogStore::open(LogConfig::in_folder(dir.path())).await?;
    let (first, other) = (name("b1"), name("b2"));
    let mut second = first.clone();
    second.attempt.number = 2;
    for log in [&first, &second, &other] {
        store.append(log, 0, line(1).into()).await?;
        store.end(log, HOT, 0).await?;
    }
    assert_eq!(
        store.remove_job(&first.tenant, &first.attempt.job).await?,
        2
    );
    assert_eq!(
        store.remove_job(&first.tenant, &first.attempt.job).await?,
        0
    );
    for log in [&first, &second] {
        let read = store.read(log, 0, 9).await;
        assert!(matches!(read, Err(LogError::NotFound { .. })), "{read:?}");
    }
    assert_eq!(all(&store, &other).await?, line(1).as_bytes());
    let left = files(&dir.path().join("ended"));
    assert!(
        left.iter()
            .all(|file| file.to_string_lossy().contains("/b2/")),
        "{left:?}"
    );
    Ok(())
}

#[tokio::test]
async fn what_an_earlier_build_wrote_of_a_logs_end_goes_with_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = LogStore::open(LogConfig::in_folder(dir.path())).await?;
    let b1 = LogName::new("a".parse()?, "b1".parse()?, 1);
    store.append(&b1, 0, line(1).into()).await?;
    store.end(&b1, HOT, 20_000 * DAY_MS).await?;
    let ended = dir.path().join("ended");
    assert!(!ended.join("expire").exists());
    let marker = ended.join("expire/hot/020000/a/b1/1");
    std::fs::create_dir_all(marker.parent().unwrap())?;
    std::fs::write(&marker, [])?;
    store.remove(&b1).await?;
    assert!(files(&ended).is_empty(), "{:?}", files(&ended));
    store.remove(&b1).await?;
    Ok(())
}

/// Two controllers end logs at one place: one writes, the other only had a follower that came too early.
#[tokio::test]
async fn a_follower_that_is_gone_hides_no_log_that_another_store_ended() -> Result<()> {
    let (here, there) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let reader = LogStore::open(LogConfig::in_folder(here.path())).await?;
    let shared = LogConfig {
        live: there.path().join("live"),
        ..LogConfig::in_folder(here.path())
    };
    let writer = LogStore::open(shared).await?;
    let b1 = name("b1");
    let early = {
        let (store, b1) = (reader.clone(), b1.clone());
        tokio::spawn(async move { followed(&store, &b1, 0).await })
    };
    let listens = async {
        while !reader.is_here(&b1) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), listens).await?;
    early.abort();
    assert!(early.await.is_err_and(|ended| ended.is_cancelled()));
    // A look at the disk that it had begun ends a moment later.
    let gone = async {
        while reader.is_here(&b1) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await?;
    writer.append(&b1, 0, Bytes::from(lines(0..30))).await?;
    writer.end(&b1, HOT, 0).await?;
    assert_eq!(all(&reader, &b1).await?, lines(0..30).as_bytes());
    Ok(())
}
