//! Decompressors of kernel images that Python's standard library lacks. The input is a file of the user's: every length is checked,
//! and nothing is allocated beyond what the caller allows.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Unpacks LZ4's "legacy" frame, as `lz4 -l` writes it for kernels, behind its magic number: blocks, each after its length (u32).
/// `size`: bytes that come out, no more and no less; else `ValueError`.
#[pyfunction]
pub fn unpack_lz4<'py>(py: Python<'py>, data: &[u8], size: usize) -> PyResult<Bound<'py, PyBytes>> {
    PyBytes::new_with(py, size, |out| py.detach(|| lz4_blocks(data, out)).map_err(PyValueError::new_err))
}

fn lz4_blocks(mut data: &[u8], out: &mut [u8]) -> Result<(), String> {
    let mut done = 0;
    while done < out.len() {
        let (length, rest) = data.split_first_chunk::<4>().ok_or("it is cut short")?;
        let length = u32::from_le_bytes(*length) as usize;
        let block = rest.get(..length).ok_or("a block ends behind the data")?;
        let got = lz4_flex::block::decompress_into(block, &mut out[done..]).map_err(|e| e.to_string())?;
        if got == 0 {
            return Err("a block without contents".into());
        }
        done += got;
        data = &rest[length..];
    }
    Ok(())
}

/// Unpacks Zstandard frames (RFC 8878) of `size` bytes together, no more and no less; else `ValueError`.
#[pyfunction]
pub fn unpack_zstd<'py>(py: Python<'py>, data: &[u8], size: usize) -> PyResult<Bound<'py, PyBytes>> {
    let unpack = |out: &mut [u8]| -> Result<(), String> {
        let mut decoder = zstd::bulk::Decompressor::new().map_err(|e| e.to_string())?;
        match decoder.decompress_to_buffer(data, out).map_err(|e| e.to_string())? {
            got if got == size => Ok(()),
            got => Err(format!("{got} bytes instead of {size}")),
        }
    };
    PyBytes::new_with(py, size, |out| py.detach(|| unpack(out)).map_err(PyValueError::new_err))
}
