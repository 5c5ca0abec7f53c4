//! Saved state from Python's plain values into the core's types, by JSON's rules and not by Python's: a number is no
//! truth value, a truth value is no number, there are no fractions.

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyInt, PyList, PyString, PyTuple};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Nesting that no state of ours comes near to.
const DEPTH: usize = 64;

/// What `value` is in JSON; `Err` says what is not.
pub fn plain(value: &Bound<'_, PyAny>) -> Result<Value, String> {
    convert(value, DEPTH)
}

fn convert(value: &Bound<'_, PyAny>, depth: usize) -> Result<Value, String> {
    let inner = depth.checked_sub(1).ok_or("it is nested too deeply")?;
    if value.is_none() {
        return Ok(Value::Null);
    }
    if let Ok(truth) = value.cast::<PyBool>() {
        return Ok(Value::Bool(truth.is_true()));
    }
    if let Ok(number) = value.cast::<PyInt>() {
        if let Ok(number) = number.extract::<u64>() {
            return Ok(number.into());
        }
        return number.extract::<i64>().map(Value::from).map_err(|_| format!("{number} does not fit in 64 bits"));
    }
    if let Ok(text) = value.cast::<PyString>() {
        return text.to_cow().map(|text| Value::String(text.into_owned())).map_err(|e| e.to_string());
    }
    if let Ok(list) = value.cast::<PyList>() {
        return list.iter().map(|item| convert(&item, inner)).collect::<Result<_, _>>().map(Value::Array);
    }
    if let Ok(tuple) = value.cast::<PyTuple>() {
        return tuple.iter().map(|item| convert(&item, inner)).collect::<Result<_, _>>().map(Value::Array);
    }
    if let Ok(dict) = value.cast::<PyDict>() {
        let mut object = Map::new();
        for (key, item) in dict {
            let key = key.extract::<String>().map_err(|_| "a name is not a string".to_string())?;
            object.insert(key, convert(&item, inner)?);
        }
        return Ok(Value::Object(object));
    }
    let kind = value.get_type().name().map_or_else(|_| "a value".into(), |name| name.to_string());
    Err(format!("{kind} is not a type that a state can hold"))
}

/// Reads a `T`; the error names the place in it.
pub fn read<T: DeserializeOwned>(value: &Bound<'_, PyAny>) -> Result<T, String> {
    serde_path_to_error::deserialize(plain(value)?).map_err(|e| match e.path().to_string().as_str() {
        "." => e.inner().to_string(),
        path => format!("{path}: {}", e.inner()),
    })
}
