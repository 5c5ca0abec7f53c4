//! The one place where errors of the core become exceptions of `freezeframe.errors`.

use memory::MemoryError;
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use vcpu::EngineError;

/// An instance of the class `name` of `freezeframe.errors`.
pub fn raise(name: &str, message: &str, keywords: &[(&str, String)]) -> PyErr {
    Python::attach(|py| {
        let made = (|| {
            let kwargs = PyDict::new(py);
            for (key, value) in keywords {
                kwargs.set_item(*key, value)?;
            }
            py.import("freezeframe.errors")?.getattr(name)?.call((message,), Some(&kwargs))
        })();
        match made {
            Ok(error) => PyErr::from_value(error),
            Err(error) => error,
        }
    })
}

/// A request or value that is wrong in itself.
pub fn refused(message: impl Into<String>) -> PyErr {
    raise("Refused", &message.into(), &[])
}

/// The operating system said no. Its own error is the cause.
pub fn io_failed(what: &str, source: &std::io::Error) -> PyErr {
    Python::attach(|py| {
        let error = raise("IoFailed", what, &[]);
        // Made from number and text, as Python's own are, so that `errno` and `strerror` are there.
        let number = source.raw_os_error().unwrap_or(libc::EIO);
        let text =
            py.import("os").and_then(|os| os.call_method1("strerror", (number,))).and_then(|text| text.extract::<String>());
        let cause = match text {
            Ok(text) => pyo3::exceptions::PyOSError::new_err((number, text)),
            Err(error) => error,
        };
        error.set_cause(py, Some(cause));
        error
    })
}

pub fn memory(error: MemoryError) -> PyErr {
    match &error {
        MemoryError::NotRam { .. } | MemoryError::Layout(_) => refused(error.to_string()),
        MemoryError::Damaged { file, chunk, .. } => Python::attach(|py| {
            let damaged = raise("Damaged", &error.to_string(), &[("file", file.clone())]);
            // The constructor takes an int here; the keyword list above is text only.
            let number = (*chunk).into_bound_py_any(py).and_then(|n| damaged.value(py).setattr("chunk", n));
            number.err().unwrap_or(damaged)
        }),
        MemoryError::Host { what, source } => io_failed(what, source),
    }
}

pub fn engine(error: EngineError) -> PyErr {
    match error.code {
        "state" => raise("Incompatible", &error.message, &[]),
        _ => raise("EngineError", &error.message, &[]),
    }
}
