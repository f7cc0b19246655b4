//! A host whose machines are simulated and whose registry is real, and a guest that builds one small image there, or lies about it.

use std::path::Path;
use std::sync::Arc;

use kiln_core::job::{ImageBuild, Limits, TrustClass};
use kiln_core::machine::BootSource;
use kiln_core::{ByteSize, Digest, JobId, JobKind, JobRequest, NetworkPolicy, TenantName};
use kiln_image::context::{self, Tree};
use kiln_image::heads::{Candidate, HeadStore};
use kiln_machine::driver::BoxFuture;
use kiln_machine::ledger::{Capacity, Ledger};
use kiln_machine::sim::{ExecCall, ExecEnd, Script, SimConfig, SimDriver};
use kiln_machine::template::TemplateStore;
use kiln_store::host::{HostConfig, HostRegistry};
use kiln_store::registry::LeaseTable;
use kiln_worker::build::{self, BuildEnd, BuildInput};
use kiln_worker::event::Events;
use kiln_worker::fleet::mask::Mask;
use kiln_worker::fleet::spool::Spool;
use kiln_worker::home::Home;
use kiln_worker::host::{Host, steady_unix_ms};
use kiln_worker::image::CurrentImage;
use kiln_worker::joblog::JobLog;
use kiln_worker::registry::RegistryAccess;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;

/// What the guest's BuildKit does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Guest {
    /// Builds, pushes, and says what it pushed.
    Honest,
    /// Pushes one image and names another.
    NamesAnother,
    /// Says it pushed, and did not.
    PushesNothing,
}

/// One host.
pub(crate) struct Workshop {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) host: Host,
    pub(crate) driver: Arc<SimDriver>,
    pub(crate) registry: RegistryAccess,
}

impl Workshop {
    pub(crate) async fn open(guest: Guest) -> Self {
        Self::open_with(guest, false).await
    }

    /// With a driver that can make templates, or not.
    pub(crate) async fn open_with(guest: Guest, templates: bool) -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        let home = Home::below(dir.path());
        home.prepare().expect("home");
        for name in ["kernel", "initrd", "root.img", "head"] {
            std::fs::write(dir.path().join(name), "a disk with nothing on it").expect("write");
        }
        let script = Script::default().on_match(
            |request| request.trusted,
            move |call: &mut ExecCall| -> BoxFuture<'_, ExecEnd> {
                Box::pin(buildkit(call, guest))
            },
        );
        let mut config = SimConfig {
            script,
            ..SimConfig::default()
        };
        config.capabilities.templates = templates;
        let driver = Arc::new(SimDriver::new(&home.data, config));
        let heads = HeadStore::open(&home.heads()).expect("heads");
        let candidate = Candidate {
            file: &dir.path().join("head"),
            stands_on: None,
            written_by: "test".to_owned(),
            buildkit: "v0".to_owned(),
            now_unix_ms: 1,
        };
        heads.seal_shared(&candidate).expect("a shared head");
        let registry = HostRegistry::open_or_attach(&home.registry(), HostConfig::default()).await;
        let host = Host {
            driver: Arc::clone(&driver) as _,
            image: image(dir.path()),
            templates: TemplateStore::open(&home.data.join("templates")).expect("templates"),
            heads,
            ledger: Ledger::new(
                &home.data,
                Capacity::of_host(400, ByteSize(0)).expect("host"),
            ),
            leases: Arc::new(LeaseTable::new(steady_unix_ms)),
            worker: "local".parse().expect("a name"),
            home,
        };
        let registry = RegistryAccess {
            host: registry.expect("a registry"),
        };
        Self {
            dir,
            host,
            driver,
            registry,
        }
    }

    /// Builds one folder, within this time.
    pub(crate) async fn build(&self, timeout_ms: u64, cancel: &CancellationToken) -> BuildEnd {
        let dispatch = kiln_core::Dispatch::default();
        self.build_as(dispatch, timeout_ms, cancel).await
    }

    /// As [`Self::build`], with these needs.
    pub(crate) async fn build_as(
        &self,
        dispatch: kiln_core::Dispatch,
        timeout_ms: u64,
        cancel: &CancellationToken,
    ) -> BuildEnd {
        let with = (TrustClass::Trusted, Vec::new());
        self.build_with(with, dispatch, timeout_ms, cancel).await
    }

    /// As [`Self::build_as`], trusted so far and with these secrets.
    pub(crate) async fn build_with(
        &self,
        (trust, secrets): (TrustClass, Vec<(String, Vec<u8>)>),
        dispatch: kiln_core::Dispatch,
        timeout_ms: u64,
        cancel: &CancellationToken,
    ) -> BuildEnd {
        let source = tempfile::tempdir().expect("temp dir");
        std::fs::write(source.path().join("file"), "content").expect("write");
        let tree = Tree::open(source.path(), None, &[], context::Limits::default());
        let tree = tree.expect("a tree");
        let id: JobId = "b1".parse().expect("an id");
        let spool = Spool::create(&self.host.home.cache.join("spool/b1.log")).expect("a spool");
        let request = JobRequest {
            id: id.clone(),
            tenant: TenantName::local(),
            kind: JobKind::ImageBuild(ImageBuild {
                source: context::digest(&tree).expect("a digest").digest,
                dockerfile: "FROM scratch\nCOPY file /\n".to_owned(),
                target: None,
                build_args: std::collections::BTreeMap::new(),
                secrets: Vec::new(),
                bases: Vec::new(),
                tags: vec!["t/local/app:latest".parse().expect("a tag")],
                no_cache: false,
            }),
            network: NetworkPolicy::Isolated,
            limits: Limits {
                cpus: 1,
                memory: ByteSize::mib(512),
                disk: ByteSize::gib(1),
                timeout_ms,
            },
            trust,
            network_bits: None,
            dispatch,
            traceparent: None,
            policy: None,
        };
        let input = BuildInput {
            request,
            tree: Arc::new(tree),
            git: None,
            secrets,
            ssh_agents: Vec::new(),
            ca_bundle: None,
            step_env: Vec::new(),
            exceptions: Vec::new(),
            proxy: kiln_network::gateway::proxy::ProxyConfig::default(),
            log: Arc::new(JobLog::new(Arc::new(spool), &Mask::new([]))),
        };
        let (events, mut receiver) = Events::channel();
        let reading = tokio::spawn(async move { while receiver.recv().await.is_some() {} });
        let lease = self.host.lease(&id, &TenantName::local(), timeout_ms);
        let end = build::run(&self.host, &self.registry, input, lease, &events, cancel).await;
        drop(events);
        reading.abort();
        end
    }

    /// No machine, nothing in quarantine, no name but those given.
    pub(crate) async fn assert_left(&self, names: &[&str], what: &str) {
        // A machine whose last handle was dropped is killed there and then, and its folder reaped by the next command.
        let leaks = self.host.reap().await.leaks;
        assert!(leaks.is_empty(), "{what}: {leaks:?}");
        let machines = std::fs::read_dir(self.host.home.data.join("machines"));
        let left: Vec<_> = machines
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name())
            .filter(|name| name != ".lock")
            .collect();
        assert!(left.is_empty(), "{what}: {left:?}");
        let all = self
            .registry
            .host
            .list_repositories(None)
            .await
            .expect("a list");
        let all: Vec<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(all, names, "{what}");
        assert!(self.dir.path().exists());
    }
}

fn image(dir: &Path) -> CurrentImage {
    CurrentImage {
        name: "ci-0000000000000000".to_owned(),
        dir: dir.to_owned(),
        boot: BootSource {
            kernel: dir.join("kernel"),
            initrd: dir.join("initrd"),
            args: Vec::new(),
            image: Digest::of(b"image"),
        },
        root: dir.join("root.img"),
        kernel_release: "6.0".to_owned(),
        buildkit: "v0".to_owned(),
    }
}

/// BuildKit's client, as far as the worker sees it: pushes an image of one layer and prints what it did.
async fn buildkit(call: &mut ExecCall, guest: Guest) -> ExecEnd {
    let asked = call.request.argv.join(" ");
    let Some(start) = asked.find("quarantine/") else {
        // The build of nothing that warms a template.
        return ExecEnd::Code(0);
    };
    let name: String = asked[start..]
        .chars()
        .take_while(|c| !"\",".contains(*c))
        .collect();
    let (repository, tag) = name.split_once(':').expect("a tag");
    let layer = vec![0; 1024];
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer)]},
    });
    let config = config.to_string().into_bytes();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    });
    let manifest = manifest.to_string().into_bytes();
    if guest != Guest::PushesNothing {
        for blob in [&layer, &config] {
            let path = format!(
                "/v2/{repository}/blobs/uploads/?digest={}",
                Digest::of(blob)
            );
            send(call, "POST", &path, "application/octet-stream", blob).await;
        }
        let path = format!("/v2/{repository}/manifests/{tag}");
        send(
            call,
            "PUT",
            &path,
            "application/vnd.oci.image.manifest.v1+json",
            &manifest,
        )
        .await;
    }
    let claimed = match guest {
        Guest::NamesAnother => Digest::of(b"another image"),
        _ => Digest::of(&manifest),
    };
    let line = format!("{{\"statuses\":[{{\"id\":\"exporting manifest {claimed}\"}}]}}\n");
    match call.stdout(line.as_bytes()).await {
        Ok(()) => ExecEnd::Code(0),
        Err(_) => ExecEnd::Signal(13),
    }
}

fn descriptor(media_type: &str, bytes: &[u8]) -> serde_json::Value {
    serde_json::json!({"mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len()})
}

/// One request to the registry, over the guest's own way to it.
async fn send(call: &ExecCall, method: &str, path: &str, kind: &str, body: &[u8]) {
    let connected = call.guest().connect("registry.kiln.internal", 80).await;
    let mut stream = connected.expect("the registry is there");
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: registry.kiln.internal\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.expect("sent");
    stream.write_all(body).await.expect("sent");
    stream.flush().await.expect("sent");
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.expect("an answer");
    assert_eq!(&answer, b"HTTP/1.1 201", "{method} {path}");
}
