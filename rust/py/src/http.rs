//! Heads of HTTP/1.1 messages, read by httparse. The sockets, the bodies and what is answered are Python's.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// More headers than any client of a VMM sends; a head with more is refused.
const MAX_HEADERS: usize = 64;

type Headers = Vec<(String, String)>;
type RequestHead = (usize, String, String, u8, Headers);

fn headers_of(headers: &[httparse::Header<'_>]) -> Headers {
    headers
        .iter()
        .map(|header| (header.name.to_ascii_lowercase(), String::from_utf8_lossy(header.value).trim().to_owned()))
        .collect()
}

/// The head of a request: `(size of the head, method, target, HTTP/1 minor version, headers with lower-case names)`, or `None` while it is
/// incomplete. `ValueError` when it can never become one.
#[pyfunction]
pub fn http_request(data: &[u8]) -> PyResult<Option<RequestHead>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(data) {
        Ok(httparse::Status::Complete(size)) => Ok(Some((
            size,
            request.method.unwrap_or_default().to_owned(),
            request.path.unwrap_or_default().to_owned(),
            request.version.unwrap_or(1),
            headers_of(request.headers),
        ))),
        Ok(httparse::Status::Partial) => Ok(None),
        Err(error) => Err(PyValueError::new_err(error.to_string())),
    }
}

/// The head of a reply: `(size of the head, status code, headers with lower-case names)`, or `None` while it is incomplete.
#[pyfunction]
pub fn http_response(data: &[u8]) -> PyResult<Option<(usize, u16, Headers)>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(data) {
        Ok(httparse::Status::Complete(size)) => Ok(Some((size, response.code.unwrap_or_default(), headers_of(response.headers)))),
        Ok(httparse::Status::Partial) => Ok(None),
        Err(error) => Err(PyValueError::new_err(error.to_string())),
    }
}
