//! How far a job is trusted (DESIGN rule 9): what its token allows AND a source that the operator trusts; a request can only take away.
//!
//! What the owner of the installation asks on the private socket is this machine's own and no server's: its source is whatever lies there.

use http::StatusCode;
use kiln_core::JobRequest;
use kiln_core::job::{JobKind, Source, TrustClass};
use kiln_db::NewJob;
use kiln_policy::UntrustedSource;

use super::caller::Caller;
use super::problem::Problem;

/// Why a job is untrusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Untrusted {
    /// Its token's jobs are.
    #[error("this token's jobs are untrusted")]
    Token,
    /// It was asked for so, or it is a job again that was untrusted.
    #[error("it was asked for as an untrusted job")]
    Asked,
    /// The operator does not trust its source.
    #[error(transparent)]
    Source(#[from] UntrustedSource),
}

impl Untrusted {
    pub(crate) fn hint(&self) -> String {
        match self {
            Self::Token => {
                "ask an admin for a token whose jobs may be trusted (`kiln token create --trusted`)"
                    .to_owned()
            }
            Self::Asked => "ask for it anew, without `\"trust\": \"untrusted\"`".to_owned(),
            Self::Source(why) => why.hint(),
        }
    }

    /// What a person should know who has a trusted token.
    pub(crate) fn note(&self) -> Option<String> {
        match self {
            Self::Source(why) => Some(format!("this job is untrusted: {why}; {}", why.hint())),
            Self::Token | Self::Asked => None,
        }
    }
}

/// A job that can be queued, and why it is untrusted if it is.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) new: NewJob,
    pub(crate) untrusted: Option<Untrusted>,
}

/// How far a job is trusted; of a trusted git source the full name of the one ref that may be fetched.
pub(crate) type Trust = Result<Option<String>, Untrusted>;

/// Of a request that says `asked`, if anything.
///
/// # Errors
/// A request that asks for more trust than it has is refused.
pub(crate) fn trust_of(
    caller: &Caller,
    asked: Option<&str>,
    source: Result<Option<String>, UntrustedSource>,
) -> Result<Trust, Problem> {
    let explicit = match asked {
        None => false,
        Some("trusted") => true,
        Some("untrusted") => return Ok(Err(Untrusted::Asked)),
        Some(_) => {
            return Err(Problem::invalid("trust", "it is `trusted` or `untrusted`"));
        }
    };
    let trust = match caller.principal.trust {
        TrustClass::Untrusted => Err(Untrusted::Token),
        TrustClass::Trusted if caller.is_on_the_socket() => Ok(None),
        TrustClass::Trusted => source.map_err(Untrusted::from),
    };
    match trust {
        Err(why) if explicit => Err(Problem::invalid("trust", why.to_string()).hint(why.hint())),
        trust => Ok(trust),
    }
}

/// Makes it so: what is trusted is fetched by its full name, and what is not has the policy of `policy_ref`, if its repository has one.
pub(crate) fn settle(
    kind: &mut JobKind,
    trust: Trust,
    policy_ref: Option<String>,
) -> (TrustClass, Option<Untrusted>) {
    if let JobKind::SourceBuild(build) = kind {
        build.policy_ref = policy_ref.filter(|_| build.repository_policy && trust.is_err());
    }
    let exact = match trust {
        Ok(exact) => exact,
        Err(why) => return (TrustClass::Untrusted, Some(why)),
    };
    if let (Some(exact), JobKind::SourceBuild(build)) = (exact, kind)
        && let Source::Git { reference, .. } = &mut build.source
    {
        *reference = exact;
    }
    (TrustClass::Trusted, None)
}

/// An open machine that learns is for trusted jobs alone.
///
/// # Errors
/// When an untrusted one is to learn.
pub(crate) fn may_learn(request: &JobRequest, why: Option<&Untrusted>) -> Result<(), Problem> {
    if !request.learns_untrusted() {
        return Ok(());
    }
    let why = why.unwrap_or(&Untrusted::Token);
    let detail = format!("only trusted jobs learn, and this job is untrusted: {why}");
    Err(
        Problem::new(StatusCode::FORBIDDEN, "policy_refused", detail)
            .field("net")
            .hint(why.hint()),
    )
}
