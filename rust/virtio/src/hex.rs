//! Saved byte strings as lower-case hexadecimal text: `#[serde(with = "hex")]`.

use serde::{Deserialize, Deserializer, Serializer, de::Error};

pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    let digits = b"0123456789abcdef";
    let text: String =
        bytes.iter().flat_map(|b| [digits[(b >> 4) as usize] as char, digits[(b & 15) as usize] as char]).collect();
    serializer.serialize_str(&text)
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let bad = || D::Error::custom("not an even number of hexadecimal digits");
    if text.len() % 2 != 0 || !text.is_ascii() {
        return Err(bad());
    }
    let nibble = |c: u8| (c as char).to_digit(16).ok_or_else(bad);
    text.as_bytes().chunks_exact(2).map(|pair| Ok((nibble(pair[0])? << 4 | nibble(pair[1])?) as u8)).collect()
}
