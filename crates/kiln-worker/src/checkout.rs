//! A git source: fetched in a machine of its own that can reach one host and runs git alone, and proven here.
//!
//! The machine sends raw objects; the host recomputes the id of each, from the commit down, and writes the files itself
//! (DESIGN rule 10, [`kiln_image::git_tree`]). No login enters the machine. Which commit a branch names is the server's
//! word; a commit asked for by its id is proven.

mod address;
mod git;
mod place;

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_core::machine::{DiskAccess, DiskFormat};
use kiln_core::network::RangeException;
use kiln_core::{ByteSize, DiskRole, DiskSlot, FailureClass, GitCommit, JobId, NetworkPolicy};
use kiln_image::context::Limits;
use kiln_image::git_tree::{self, GitTreeError, ObjectId, Received, Whose};
use kiln_network::gateway::proxy::ProxyConfig;
use kiln_network::gateway::{Gateway, GatewayConfig, Services as KilnNames};
use kiln_network::record::{EgressLog, EgressSummary};
use kiln_proto::Session;
use kiln_proto::msg::Place;
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio_util::io::SyncIoBridge;
use tokio_util::sync::CancellationToken;

pub use self::address::{Address, Reference};
pub use self::place::CheckoutDir;

use self::git::{Git, REPOSITORY, Said};
use crate::attempt::{Attempt, Wanted};
use crate::event::{Event, Events};
use crate::failure::Failure;
use crate::host::Host;
use crate::orders::{self, ExecIo, chain};
use crate::templates::Purpose;

/// Memory of a checkout machine: the smallest class, whose template runs and checkouts share.
const MEMORY: ByteSize = ByteSize::mib(512);
/// Most that a repository may take on the machine's disk; only what is written takes space.
const DISK_SIZE: ByteSize = ByteSize::gib(32);
/// Longest short command of git.
const SHORT: Duration = Duration::from_secs(60);
/// Most bytes of questions on their way to git.
const QUESTION_BYTES: usize = 64 * 1024;
/// Output chunks that may wait for the hashing thread.
const CHUNKS: usize = 16;

/// What to check out, and how the host reaches it.
#[derive(Clone, Debug)]
pub struct CheckoutInput {
    /// Job the machine belongs to.
    pub job: JobId,
    /// From where.
    pub address: Address,
    /// The operator's CA bundle.
    pub ca_bundle: Option<Vec<u8>>,
    /// The operator's exceptions.
    pub exceptions: Vec<RangeException>,
    /// The host's HTTP proxy.
    pub proxy: ProxyConfig,
    /// Its ref is fetched by exactly this name, or not at all: git would take another that ends with it where there is none.
    pub exact: bool,
    /// What else of the repository is looked at.
    pub beside: Option<Beside>,
    /// How large the tree may be.
    pub limits: Limits,
    /// How long it may take in all.
    pub timeout: Duration,
    /// Bytes per second of its network, each way; none means no bound.
    pub bytes_per_second: Option<std::num::NonZeroU64>,
}

/// Files of another ref of the repository, taken before anything of the commit itself is fetched.
#[derive(Clone, Debug)]
pub struct Beside {
    /// Which ref, by exactly this name.
    pub reference: Reference,
    /// Which files; those that are not there are left out.
    pub names: &'static [&'static str],
    /// Most bytes of each.
    pub bytes_max: u64,
}

/// What was found of a [`Beside`].
#[derive(Clone, Debug)]
pub struct FilesBeside {
    /// Its ref.
    pub reference: String,
    /// The commit that the server named for it.
    pub commit: ObjectId,
    /// Its files, their ids recomputed here.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// A commit's files on this host.
#[derive(Clone, Debug)]
pub struct Checkout {
    /// The folder; removed with the last clone.
    pub dir: Arc<CheckoutDir>,
    /// The commit, its ids recomputed here.
    pub git: GitCommit,
    /// What else of the repository was asked for.
    pub beside: Option<FilesBeside>,
    /// What the machine reached and was refused.
    pub egress: EgressSummary,
}

/// Fetches a commit and writes its files.
///
/// # Errors
/// Usage for a URL, ref or repository that cannot be had; policy for a host that may not be reached; guest fault for
/// objects that are not what they claim.
pub async fn checkout(
    host: &Host,
    input: CheckoutInput,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<Checkout, Failure> {
    events.tell(Event::Phase { name: "checkout" }).await;
    let parent = host.home.cache.join("checkouts");
    let name = input.job.to_string();
    let made = tokio::task::spawn_blocking(move || {
        place::sweep(&parent)?;
        CheckoutDir::new(&parent, &name)
    });
    let made = made
        .await
        .map_err(|error| Failure::infrastructure(&error))?;
    let dir = Arc::new(made.map_err(|error| Failure::infrastructure(&error))?);
    let egress = Arc::new(EgressLog::new());
    let result = in_time(
        host,
        &input,
        Arc::clone(&dir),
        Arc::clone(&egress),
        events,
        cancel,
    )
    .await;
    let egress = egress.snapshot().summary();
    let (received, beside) = result.map_err(|failure| refused(failure, &egress))?;
    tell(&received, &input.address, events).await;
    events.note(egress.to_string()).await;
    let git = GitCommit {
        url: input.address.url,
        reference: input.address.reference.to_string(),
        commit: received.commit.to_string(),
        tree: received.tree.to_string(),
    };
    Ok(Checkout {
        dir,
        git,
        beside,
        egress,
    })
}

async fn in_time(
    host: &Host,
    input: &CheckoutInput,
    dir: Arc<CheckoutDir>,
    egress: Arc<EgressLog>,
    events: &Events,
    cancel: &CancellationToken,
) -> Result<Fetched, Failure> {
    let work = async {
        let attempt = start(host, input, egress, events).await?;
        let result = fetch(&attempt, input, dir, events).await;
        let result = match result {
            Err(failure) => Err(attempt.explain(failure).await),
            ok => ok,
        };
        attempt.destroy(events).await;
        result
    };
    // Dropped, the work ends its machine.
    tokio::select! {
        result = tokio::time::timeout(input.timeout, work) => result.unwrap_or_else(|_| {
            let message = format!("the checkout took longer than {:?}", input.timeout);
            Err(Failure::new(FailureClass::Timeout, message).hint("give it more with --timeout"))
        }),
        () = cancel.cancelled() => Err(Failure::cancelled()),
    }
}

/// A machine that can reach the repository's host and nothing else, not even kiln's own services.
async fn start(
    host: &Host,
    input: &CheckoutInput,
    egress: Arc<EgressLog>,
    events: &Events,
) -> Result<Attempt, Failure> {
    let ticket = host.admit(1, MEMORY, input.job.as_str(), events).await?;
    let name = format!("{}-1-checkout", input.job)
        .parse()
        .map_err(|error| Failure::infrastructure(&error))?;
    let wanted = Wanted {
        name,
        cpus: 1,
        memory: MEMORY,
        purpose: Purpose::Run,
        make_template: true,
        may_stay: false,
        disk_bytes_per_second: None,
    };
    let policy = NetworkPolicy::from_rules([input.address.rule.clone()]);
    let mut config = GatewayConfig::new(policy, egress as _);
    config.exceptions.clone_from(&input.exceptions);
    config.proxy = input.proxy.clone();
    config.limits.bytes_out_per_second = input.bytes_per_second;
    config.limits.bytes_in_per_second = input.bytes_per_second;
    config.services = KilnNames::default();
    Attempt::start(host, wanted, ticket, Gateway::new(config), events).await
}

/// A commit's files, and what else was asked for.
type Fetched = (Received, Option<FilesBeside>);

async fn fetch(
    attempt: &Attempt,
    input: &CheckoutInput,
    dir: Arc<CheckoutDir>,
    events: &Events,
) -> Result<Fetched, Failure> {
    let disk = DiskSlot {
        role: DiskRole::Scratch,
        backing: None,
        format: DiskFormat::Qcow2,
        access: DiskAccess::New { size: DISK_SIZE },
    };
    attempt.machine.attach_disk(&disk).await?;
    attempt.mount(DiskRole::Scratch, false, true).await?;
    let session = &attempt.session;
    let mut ca_path = None;
    if let Some(bundle) = &input.ca_bundle {
        let report =
            orders::put_file(session, "take the CA bundle", Place::CaBundle, bundle).await?;
        ca_path = Some(report.path);
    }
    let git = Git::new(ca_path.as_deref());
    let init = ["init", "--quiet", "--bare", REPOSITORY];
    git.run(session, "make a repository", &init, SHORT, events)
        .await?
        .check("make a repository")?;
    // First: nothing that the commit's author wrote came near git in this machine yet.
    let found = match &input.beside {
        Some(wanted) => Some(beside(&git, session, input, wanted, events).await?),
        None => None,
    };
    let wanted = &input.address.reference;
    if input.exact {
        advertised(&git, session, input, wanted, events).await?;
    }
    let commit = fetched(&git, session, input, wanted, events).await?;
    if let Reference::Commit(asked) = wanted
        && *asked != commit
    {
        return Err(Failure::new(
            FailureClass::Usage,
            format!("{asked} is not a commit: it leads to the commit {commit}"),
        )
        .hint("give the commit's id"));
    }
    let received = take(&git, session, commit, dir, input.limits, events).await?;
    Ok((received, found))
}

/// Takes files of another ref.
async fn beside(
    git: &Git,
    session: &Session,
    input: &CheckoutInput,
    wanted: &Beside,
    events: &Events,
) -> Result<FilesBeside, Failure> {
    let reference = &wanted.reference;
    let work = async {
        advertised(git, session, input, reference, events).await?;
        let commit = fetched(git, session, input, reference, events).await?;
        let (names, bytes_max) = (wanted.names, wanted.bytes_max);
        let files = objects(git, session, move |answers, questions| {
            git_tree::read_files(answers, questions, commit, names, bytes_max)
        });
        Ok((commit, files.await?))
    };
    let (commit, files) = work.await.map_err(|failure: Failure| Failure {
        message: format!("{reference} of the repository: {}", failure.message),
        ..failure
    })?;
    Ok(FilesBeside {
        reference: reference.to_string(),
        commit,
        files,
    })
}

/// The server has a ref of exactly this name: git, which would look for others, then takes this one.
async fn advertised(
    git: &Git,
    session: &Session,
    input: &CheckoutInput,
    reference: &Reference,
    events: &Events,
) -> Result<(), Failure> {
    let (wanted, url) = (reference.refspec(), &input.address.url);
    let what = "look for the ref";
    let args = [
        "-C",
        REPOSITORY,
        "-c",
        "credential.helper=",
        "-c",
        "http.followRedirects=initial",
        "-c",
        "http.lowSpeedLimit=100",
        "-c",
        "http.lowSpeedTime=60",
        "ls-remote",
        "--quiet",
        "--",
        url,
        &wanted,
    ];
    let said = git.run(session, what, &args, input.timeout, events).await?;
    let said = said.check(what)?;
    if said.names_ref(&wanted) {
        return Ok(());
    }
    let message = format!("{url} has no ref that is called exactly {wanted}");
    Err(Failure::new(FailureClass::Usage, message)
        .hint("a name alone means a branch of a trusted job: write a tag as URL#refs/tags/NAME"))
}

/// What git is told for a fetch: settings of the machine and of the repository have no say in it.
fn fetch_words<'a>(url: &'a str, refspec: &'a str) -> [&'a str; 28] {
    [
        "-C",
        REPOSITORY,
        "-c",
        "credential.helper=",
        "-c",
        "core.hooksPath=/dev/null",
        "-c",
        "http.followRedirects=initial",
        // A server that stands still is given up.
        "-c",
        "http.lowSpeedLimit=100",
        "-c",
        "http.lowSpeedTime=60",
        // A pack stays a pack, whatever its size; large files stream.
        "-c",
        "fetch.unpackLimit=1",
        "-c",
        "core.bigFileThreshold=16m",
        "-c",
        "pack.threads=1",
        "fetch",
        "--progress",
        "--depth=1",
        "--no-tags",
        "--no-recurse-submodules",
        "--no-auto-maintenance",
        "--no-write-commit-graph",
        "--",
        url,
        refspec,
    ]
}

/// Fetches into the machine's repository; the id that git there gives for the commit.
async fn fetched(
    git: &Git,
    session: &Session,
    input: &CheckoutInput,
    reference: &Reference,
    events: &Events,
) -> Result<ObjectId, Failure> {
    let refspec = reference.refspec();
    let what = "fetch the repository";
    let args = fetch_words(&input.address.url, &refspec);
    git.run(session, what, &args, input.timeout, events)
        .await?
        .check(what)?;
    let what = "name the commit";
    let args = [
        "-C",
        REPOSITORY,
        "rev-parse",
        "--verify",
        "--quiet",
        "--end-of-options",
        "FETCH_HEAD^{commit}",
    ];
    let said = git.run(session, what, &args, SHORT, events).await?;
    if said.exit.as_ref().is_some_and(|exit| exit.code == Some(1)) {
        return Err(Failure::new(
            FailureClass::Usage,
            format!("{refspec} does not lead to a commit"),
        ));
    }
    let said = said.check(what)?;
    said.line().parse().map_err(|_| {
        Failure::new(
            FailureClass::GuestFault,
            "git in the checkout machine named no commit id",
        )
    })
}

/// Takes the commit's objects out of the machine, each hashed again.
async fn take(
    git: &Git,
    session: &Session,
    commit: ObjectId,
    dir: Arc<CheckoutDir>,
    limits: Limits,
    events: &Events,
) -> Result<Received, Failure> {
    let told = events.clone();
    // The folder is held by the thread that writes it: it is not removed under its hands.
    let work = move |answers: Answers, questions| {
        let mut last = 0;
        git_tree::receive(answers, questions, commit, dir.path(), limits, &mut |now| {
            let percent = now.blobs * 100 / now.blobs_all.max(1);
            if percent != last {
                last = percent;
                let detail = format!(
                    "{} of {} files, {}",
                    now.blobs,
                    now.blobs_all,
                    ByteSize(now.bytes)
                );
                told.tell_now(Event::Progress {
                    what: "checking every object".to_owned(),
                    detail,
                });
            }
        })
    };
    objects(git, session, work).await
}

/// Lets `work` ask a `git cat-file --batch` of the machine.
async fn objects<T: Send + 'static>(
    git: &Git,
    session: &Session,
    work: impl FnOnce(Answers, SyncIoBridge<DuplexStream>) -> Result<T, GitTreeError> + Send + 'static,
) -> Result<T, Failure> {
    let what = "send the commit's objects";
    let mut request = git.request(&["-C", REPOSITORY, "cat-file", "--batch"], Duration::ZERO);
    request.stdin = true;
    let (questions, stdin) = tokio::io::duplex(QUESTION_BYTES);
    let (sender, chunks) = mpsc::channel(CHUNKS);
    let (_no_orders, control) = mpsc::channel(1);
    let said = Arc::new(Mutex::new(Said::default()));
    let answers = Answers {
        chunks,
        now: VecDeque::new(),
        said: Arc::clone(&said),
    };
    let questions = SyncIoBridge::new(questions);
    let taking = tokio::task::spawn_blocking(move || work(answers, questions));
    let io = ExecIo {
        stdin: Some(Box::new(stdin)),
        output: sender,
        control,
    };
    let exec = orders::exec(session, what, &request, io);
    tokio::pin!(exec, taking);
    // Git ends when there are no more questions; before that, its end is what went wrong.
    let (taken, exit) = tokio::select! {
        taken = &mut taking => (taken, None),
        exit = &mut exec => (taking.await, Some(exit)),
    };
    let error = match taken.map_err(|error| Failure::infrastructure(&error))? {
        Ok(received) => return Ok(received),
        Err(error) => error,
    };
    if error.whose() == Whose::Connection
        && let Some(exit) = exit
    {
        let mut said = std::mem::take(&mut *said.lock().unwrap_or_else(PoisonError::into_inner));
        said.exit = Some(exit?);
        said.check(what)?;
    }
    Err(failure(&error))
}

/// What is wrong with a commit, or with what was sent for it.
fn failure(error: &GitTreeError) -> Failure {
    let class = match error.whose() {
        Whose::Repository if matches!(error, GitTreeError::Collision { .. }) => {
            FailureClass::Policy
        }
        Whose::Repository => FailureClass::Usage,
        Whose::Sender => FailureClass::GuestFault,
        Whose::Connection => FailureClass::Lost,
        Whose::Host => FailureClass::Infrastructure,
    };
    Failure::new(class, chain(error))
}

/// A fetch that failed because the gateway refused it says so.
fn refused(failure: Failure, egress: &EgressSummary) -> Failure {
    if !matches!(
        failure.class,
        FailureClass::Infrastructure | FailureClass::Usage
    ) {
        return failure;
    }
    let Some(refused) = egress.refused.first() else {
        return failure;
    };
    let place = format!("{}:{}", refused.host, refused.port);
    if refused.reason.starts_with("unreachable") {
        let message = format!(
            "{place} could not be reached ({})\n{}",
            refused.reason, failure.message
        );
        return Failure::new(failure.class, message)
            .hint("check the URL's host name, and whether this host reaches it");
    }
    let message = format!(
        "the checkout machine may not reach {place} ({})\n{}",
        refused.reason, failure.message
    );
    Failure::new(FailureClass::Policy, message)
        .hint("a checkout reaches the URL's own host alone; for a host in a private range the operator writes an exception in registries.toml")
}

async fn tell(received: &Received, address: &Address, events: &Events) {
    let (files, bytes) = (received.files, ByteSize(received.bytes));
    let text = format!(
        "{} at {} is commit {} ({files} files, {bytes})",
        address.url, address.reference, received.commit
    );
    events.note(text).await;
    for ((count, named), what) in [
        (
            &received.submodules,
            "submodules are not fetched; their folders are empty",
        ),
        (
            &received.lfs_pointers,
            "files are pointers of Git LFS; their content is not fetched",
        ),
    ] {
        if *count > 0 {
            let more = if *count > named.len() as u64 {
                ", ..."
            } else {
                ""
            };
            events
                .warn(format!("{count} {what}: {}{more}", named.join(", ")))
                .await;
        }
    }
}

/// Standard output of a command, for a blocking reader; what it says beside is kept.
struct Answers {
    chunks: mpsc::Receiver<(u8, Vec<u8>)>,
    now: VecDeque<u8>,
    said: Arc<Mutex<Said>>,
}

impl Read for Answers {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.now.is_empty() {
            match self.chunks.blocking_recv() {
                None => return Ok(0),
                Some((1, bytes)) => self.now = bytes.into(),
                Some((stream, bytes)) => self
                    .said
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .add(stream, &bytes),
            }
        }
        self.now.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkout_asks_no_helper_runs_no_hook_and_follows_no_submodule() {
        let url = "https://git.example.org/app";
        let words = fetch_words(url, "main");
        let at = |word: &str| words.iter().position(|one| *one == word).expect(word);
        let fetch = at("fetch");
        for setting in ["credential.helper=", "core.hooksPath=/dev/null"] {
            let place = at(setting);
            assert!(place < fetch && words[place - 1] == "-c", "{setting}");
        }
        assert!(at("--no-recurse-submodules") > fetch);
        // Neither can be an option, whatever it begins with.
        assert_eq!(words[words.len() - 3..], ["--", url, "main"]);
    }

    #[test]
    fn output_and_words_are_told_apart() {
        let (sender, chunks) = mpsc::channel(8);
        for (stream, bytes) in [(1, &b"ab"[..]), (2, b"oops\n"), (1, b""), (1, b"c")] {
            sender.try_send((stream, bytes.to_vec())).expect("room");
        }
        drop(sender);
        let said = Arc::new(Mutex::new(Said::default()));
        let mut answers = Answers {
            chunks,
            now: VecDeque::new(),
            said: Arc::clone(&said),
        };
        let mut text = String::new();
        answers.read_to_string(&mut text).expect("read");
        assert_eq!(text, "abc");
        assert_eq!(said.lock().expect("lock").words(), "oops");
    }

    #[test]
    fn a_refused_host_explains_a_failed_fetch() {
        let refusal = kiln_network::record::RefusedHost {
            host: "git.example.org".to_owned(),
            port: 443,
            reason: "10.0.0.1 is a private address".to_owned(),
            code: "address_not_allowed".to_owned(),
            allow: None,
            addresses: Vec::new(),
        };
        let egress = EgressSummary {
            reached: Vec::new(),
            refused: vec![refusal],
            ..EgressSummary::default()
        };
        let failed = Failure::new(FailureClass::Infrastructure, "git could not fetch");
        let explained = refused(failed.clone(), &egress);
        assert_eq!(explained.class, FailureClass::Policy);
        assert!(
            explained.message.contains("10.0.0.1")
                && explained.message.contains("git could not fetch")
        );
        assert_eq!(refused(Failure::cancelled(), &egress), Failure::cancelled());
        assert_eq!(refused(failed.clone(), &EgressSummary::default()), failed);
    }
}
