//! Uploads in parts that nobody finished: a kill leaves them in a bucket, no list of objects shows them, and they are paid for.
//!
//! The object store's library has no word for them, so the two requests are made here (`ListMultipartUploads`, then its own abort), signed
//! as all others are. What is listed is the bucket's word: bounded, and only what is below kiln's own folders is ended.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::TryStreamExt as _;
use http::Method;
use object_store::aws::{AmazonS3, AwsAuthorizer};
use object_store::client::{ClientOptions, HttpClient, HttpConnector as _, HttpRequestBody};
use object_store::multipart::MultipartStore as _;
use object_store::path::Path as Key;

use super::BucketError;
use crate::logs::{LogError, S3Target, connector, open_amazon};
use crate::registry::http::route::percent_encoded;

/// Longest list of one request: a thousand uploads.
const LIST_MAX: usize = 4 << 20;
/// Most requests for lists of one sweep; the next goes on.
const PAGES_MAX: usize = 50;

/// Asks a bucket for uploads that nobody finished.
#[derive(Debug)]
pub(super) struct Unfinished {
    s3: AmazonS3,
    http: HttpClient,
    /// Address of the bucket.
    url: String,
    region: String,
    /// Folder within it; empty for none.
    prefix: String,
}

/// An upload that is not finished.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Begun {
    key: String,
    id: String,
    at: Option<SystemTime>,
}

impl Unfinished {
    /// Of a bucket; asks it nothing yet.
    pub(super) fn new(target: &S3Target) -> Result<Self, LogError> {
        let unusable = |error: object_store::Error| LogError::Target {
            why: error.to_string(),
        };
        let http = connector(target)?.connect(&ClientOptions::new());
        let service = match &target.endpoint {
            Some(endpoint) => endpoint.clone(),
            None => format!("https://s3.{}.amazonaws.com", target.region),
        };
        Ok(Self {
            s3: open_amazon(target)?,
            http: http.map_err(unusable)?,
            url: format!("{service}/{}", target.bucket),
            region: target.region.clone(),
            prefix: target.prefix.clone(),
        })
    }

    /// Ends uploads below a folder that began longer ago than `age`; gives how many.
    pub(super) async fn end(&self, folder: &str, age: Duration) -> Result<u64, BucketError> {
        let below = match self.prefix.as_str() {
            "" => format!("{folder}/"),
            prefix => format!("{prefix}/{folder}/"),
        };
        let (mut ended, mut marker) = (0, String::new());
        for _ in 0..PAGES_MAX {
            let text = self.list(&below, &marker).await?;
            for begun in uploads(&text) {
                let is_old = begun
                    .at
                    .is_some_and(|at| at.elapsed().is_ok_and(|is| is >= age));
                if is_old && begun.key.starts_with(&below) {
                    ended += u64::from(self.abort(&begun).await?);
                }
            }
            match next(&text) {
                Some(next) => marker = next,
                None => break,
            }
        }
        Ok(ended)
    }

    async fn list(&self, below: &str, marker: &str) -> Result<String, BucketError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| BucketError::Objects {
            what: "list unfinished uploads below",
            key: below.to_owned(),
            source,
        };
        let credential = self.s3.credentials().get_credential().await;
        let credential = credential.map_err(|error| failed(error.into()))?;
        let url = format!(
            "{}?uploads=&prefix={}{marker}",
            self.url,
            percent_encoded(below)
        );
        let request = http::Request::builder().method(Method::GET).uri(url);
        let mut request = request
            .body(HttpRequestBody::empty())
            .map_err(|error| failed(error.into()))?;
        AwsAuthorizer::new(&credential, "s3", &self.region)
            .try_authorize(&mut request, None)
            .map_err(|error| failed(error.into()))?;
        let answer = self.http.execute(request).await;
        let answer = answer.map_err(|error| failed(error.into()))?;
        let status = answer.status();
        let mut bytes = Vec::new();
        let mut pieces = answer.into_body().bytes_stream();
        while let Some(piece) = pieces
            .try_next()
            .await
            .map_err(|error| failed(error.into()))?
        {
            if bytes.len() + piece.len() > LIST_MAX {
                return Err(failed("the list is too long".into()));
            }
            bytes.extend_from_slice(&piece);
        }
        let text = String::from_utf8_lossy(&bytes).into_owned();
        match status.is_success() {
            true => Ok(text),
            false => {
                let code = element(&text, "Code").unwrap_or_default();
                Err(failed(format!("{status} {code}").into()))
            }
        }
    }

    /// Ends one; false when it has ended meanwhile.
    async fn abort(&self, begun: &Begun) -> Result<bool, BucketError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| BucketError::Objects {
            what: "end the upload of",
            key: begun.key.clone(),
            source,
        };
        let key = Key::parse(&begun.key).map_err(|error| failed(error.into()))?;
        match self.s3.abort_multipart(&key, &begun.id).await {
            Ok(()) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(failed(error.into())),
        }
    }
}

/// The text of the first element of this name: the lists are flat, and kiln's keys have no characters that XML writes otherwise.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let rest = text.split_once(&format!("<{name}>"))?.1;
    Some(rest.split_once(&format!("</{name}>"))?.0)
}

/// The uploads of a list (S3 API, `ListMultipartUploads`). One that cannot be read is left alone.
fn uploads(text: &str) -> Vec<Begun> {
    let each = text.split("<Upload>").skip(1);
    let each = each.filter_map(|part| Some(part.split_once("</Upload>")?.0));
    each.filter_map(|upload| {
        Some(Begun {
            key: element(upload, "Key")?.to_owned(),
            id: element(upload, "UploadId")?.to_owned(),
            at: element(upload, "Initiated").and_then(moment),
        })
    })
    .collect()
}

/// What the request for the next list says more; none at the end.
fn next(text: &str) -> Option<String> {
    if element(text, "IsTruncated") != Some("true") {
        return None;
    }
    let key = percent_encoded(element(text, "NextKeyMarker")?);
    let id = percent_encoded(element(text, "NextUploadIdMarker").unwrap_or_default());
    Some(format!("&key-marker={key}&upload-id-marker={id}"))
}

/// `2031-05-04T13:02:11.000Z` (ISO 8601, always UTC there), to the second.
fn moment(text: &str) -> Option<SystemTime> {
    let number = |from: usize, to: usize| text.get(from..to)?.parse::<u64>().ok();
    let marks = [(4, "-"), (7, "-"), (10, "T"), (13, ":"), (16, ":")];
    let shaped = marks
        .iter()
        .all(|(at, mark)| text.get(*at..*at + 1) == Some(*mark));
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !shaped || !text.ends_with('Z') || !(1970..=9999).contains(&year) {
        return None;
    }
    if !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
        || hour > 23
        || minute > 59
        || second > 60
    {
        return None;
    }
    // Days of the civil calendar, counted in years that begin with March, so that a leap day is their last.
    let (year, month) = match month {
        3.. => (year, month - 3),
        _ => (year - 1, month + 9),
    };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1;
    // 1970-01-01 is this many days after 0000-03-01.
    let days = days.checked_sub(719_468)?;
    UNIX_EPOCH.checked_add(Duration::from_secs(
        days * 86_400 + hour * 3600 + minute * 60 + second,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Option<u64> {
        let since = moment(text)?.duration_since(UNIX_EPOCH);
        Some(since.expect("later").as_secs())
    }

    #[test]
    fn moments_as_buckets_write_them() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00.000Z", 0),
            ("2000-02-29T12:00:00Z", 951_825_600),
            ("2000-03-01T00:00:00Z", 951_868_800),
            ("2023-11-14T22:13:20.123Z", 1_700_000_000),
            ("2100-03-01T00:00:00Z", 4_107_542_400),
        ] {
            assert_eq!(at(text), Some(seconds), "{text}");
        }
        for bad in [
            "",
            "yesterday",
            "2023-11-14 22:13:20Z",
            "2023-13-14T22:13:20Z",
            "2023-11-14T22:13:20+01:00",
            "1969-12-31T23:59:59Z",
            "２023-11-14T22:13:20Z",
        ] {
            assert_eq!(at(bad), None, "{bad}");
        }
    }

    #[test]
    fn lists_are_read_as_far_as_they_make_sense() {
        let upload = |key: &str| {
            format!(
                "<Upload><Initiated>2023-11-14T22:13:20.000Z</Initiated><Key>{key}</Key><Owner><ID>x</ID></Owner><UploadId>u-{key}</UploadId></Upload>"
            )
        };
        let list = format!(
            "<?xml version=\"1.0\"?><ListMultipartUploadsResult><IsTruncated>true</IsTruncated><NextKeyMarker>b c</NextKeyMarker>\
             <NextUploadIdMarker>u+b</NextUploadIdMarker>{}{}<Upload><Key>half</Key></Upload><Upload><Key>cut",
            upload("images/a"),
            upload("b")
        );
        let found = uploads(&list);
        let keys: Vec<_> = found
            .iter()
            .map(|one| (one.key.as_str(), one.id.as_str()))
            .collect();
        assert_eq!(keys, [("images/a", "u-images/a"), ("b", "u-b")]);
        assert!(found.iter().all(|one| one.at.is_some()));
        let marker = next(&list).expect("more");
        assert_eq!(marker, "&key-marker=b%20c&upload-id-marker=u%2Bb");
        assert_eq!(next(&list.replace(">true<", ">false<")), None);
        assert!(uploads("<html>").is_empty());
    }
}
