//! JSON by a schema that Python declares, read by serde: the messages and positions of a refused document are serde_json's own
//! (``missing field `source_url` at line 1 column 2``), because clients of the REST API know those texts.

use std::{fmt, io};

use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use serde::de::{self, DeserializeSeed, Deserializer, EnumAccess, Error as _, MapAccess, SeqAccess, VariantAccess, Visitor};
use serde::ser::{Error as _, Serialize, SerializeMap, SerializeSeq, Serializer};

/// What a value may be. Built from Python tuples, see `JsonSchema`.
enum Schema {
    Any,
    /// Any value without fractions, each name of an object once: what a saved state may hold.
    Values,
    Bool,
    Text,
    Int {
        name: String,
        min: i128,
        max: i128,
    },
    Variant(Vec<String>),
    Optional(Box<Schema>),
    List(Box<Schema>),
    Record {
        name: String,
        fields: Vec<Field>,
        strict: bool,
    },
}

struct Field {
    name: String,
    aliases: Vec<String>,
    required: bool,
    schema: Schema,
}

impl Schema {
    fn parse(description: &Bound<'_, PyAny>) -> PyResult<Schema> {
        let tuple = description.cast::<PyTuple>()?;
        let kind: String = tuple.get_item(0)?.extract()?;
        Ok(match kind.as_str() {
            "any" => Schema::Any,
            "values" => Schema::Values,
            "bool" => Schema::Bool,
            "str" => Schema::Text,
            "int" => Schema::Int {
                name: tuple.get_item(1)?.extract()?,
                min: tuple.get_item(2)?.extract()?,
                max: tuple.get_item(3)?.extract()?,
            },
            "enum" => Schema::Variant(tuple.get_item(1)?.extract()?),
            "optional" => Schema::Optional(Box::new(Schema::parse(&tuple.get_item(1)?)?)),
            "list" => Schema::List(Box::new(Schema::parse(&tuple.get_item(1)?)?)),
            "record" => {
                let mut fields = Vec::new();
                for item in tuple.get_item(2)?.try_iter()? {
                    let item = item?;
                    let field = item.cast::<PyTuple>()?;
                    fields.push(Field {
                        name: field.get_item(0)?.extract()?,
                        schema: Schema::parse(&field.get_item(1)?)?,
                        required: field.get_item(2)?.extract()?,
                        aliases: field.get_item(3)?.extract()?,
                    });
                }
                Schema::Record { name: tuple.get_item(1)?.extract()?, fields, strict: tuple.get_item(3)?.extract()? }
            }
            other => return Err(PyTypeError::new_err(format!("unknown schema kind {other:?}"))),
        })
    }
}

/// ``expected one of `A`, `B` ``, as serde writes lists of names.
struct OneOf<'a, I: Iterator<Item = &'a str> + Clone>(I);

impl<'a, I: Iterator<Item = &'a str> + Clone> fmt::Display for OneOf<'a, I> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.0.clone().collect();
        match names.as_slice() {
            [] => formatter.write_str("there are no names"),
            [one] => write!(formatter, "expected `{one}`"),
            [one, two] => write!(formatter, "expected `{one}` or `{two}`"),
            many => {
                formatter.write_str("expected one of ")?;
                for (index, name) in many.iter().enumerate() {
                    write!(formatter, "{}`{name}`", if index > 0 { ", " } else { "" })?;
                }
                Ok(())
            }
        }
    }
}

/// Reads one value of a schema into a Python object.
#[derive(Clone, Copy)]
struct Seed<'a, 'py> {
    schema: &'a Schema,
    py: Python<'py>,
}

fn python_error<E: de::Error>(error: PyErr) -> E {
    E::custom(error)
}

impl<'py> Seed<'_, 'py> {
    fn object<T: IntoPyObject<'py>, E: de::Error>(&self, value: T) -> Result<Bound<'py, PyAny>, E>
    where
        T::Error: Into<PyErr>,
    {
        value.into_bound_py_any(self.py).map_err(python_error)
    }
}

impl<'de, 'py> DeserializeSeed<'de> for Seed<'_, 'py> {
    type Value = Bound<'py, PyAny>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        match self.schema {
            Schema::Any | Schema::Values => deserializer.deserialize_any(self),
            Schema::Bool => deserializer.deserialize_bool(self),
            Schema::Text => deserializer.deserialize_str(self),
            Schema::Int { min, .. } if *min < 0 => deserializer.deserialize_i64(self),
            Schema::Int { .. } => deserializer.deserialize_u64(self),
            Schema::Variant(_) => deserializer.deserialize_enum("", &[], self),
            Schema::Optional(_) => deserializer.deserialize_option(self),
            Schema::List(_) => deserializer.deserialize_seq(self),
            Schema::Record { .. } => deserializer.deserialize_map(self),
        }
    }
}

impl<'de, 'py> Visitor<'de> for Seed<'_, 'py> {
    type Value = Bound<'py, PyAny>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.schema {
            Schema::Any => formatter.write_str("any JSON value"),
            Schema::Values => formatter.write_str("any JSON value without fractions"),
            Schema::Bool => formatter.write_str("a boolean"),
            Schema::Text => formatter.write_str("a string"),
            Schema::Int { name, .. } => formatter.write_str(name),
            Schema::Variant(_) => formatter.write_str("a variant name"),
            Schema::Optional(_) => formatter.write_str("option"),
            Schema::List(_) => formatter.write_str("a sequence"),
            Schema::Record { name, .. } => write!(formatter, "struct {name}"),
        }
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Self::Value, E> {
        match self.schema {
            Schema::Any | Schema::Values | Schema::Bool => self.object(value),
            _ => Err(E::invalid_type(de::Unexpected::Bool(value), &self)),
        }
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Self::Value, E> {
        match self.schema {
            Schema::Any | Schema::Values => self.object(value),
            Schema::Int { max, .. } if i128::from(value) <= *max => self.object(value),
            Schema::Int { .. } => Err(E::invalid_value(de::Unexpected::Unsigned(value), &self)),
            _ => Err(E::invalid_type(de::Unexpected::Unsigned(value), &self)),
        }
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Self::Value, E> {
        match self.schema {
            Schema::Any | Schema::Values => self.object(value),
            Schema::Int { min, max, .. } if (*min..=*max).contains(&i128::from(value)) => self.object(value),
            Schema::Int { .. } => Err(E::invalid_value(de::Unexpected::Signed(value), &self)),
            _ => Err(E::invalid_type(de::Unexpected::Signed(value), &self)),
        }
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Self::Value, E> {
        match self.schema {
            Schema::Any => self.object(value),
            _ => Err(E::invalid_type(de::Unexpected::Float(value), &self)),
        }
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Self::Value, E> {
        match self.schema {
            Schema::Any | Schema::Values | Schema::Text => self.object(value),
            _ => Err(E::invalid_type(de::Unexpected::Str(value), &self)),
        }
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        match self.schema {
            Schema::Any | Schema::Values | Schema::Optional(_) => Ok(self.py.None().into_bound(self.py)),
            _ => Err(E::invalid_type(de::Unexpected::Unit, &self)),
        }
    }

    fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
        self.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        match self.schema {
            Schema::Optional(inner) => Seed { schema: inner, py: self.py }.deserialize(deserializer),
            _ => Err(D::Error::invalid_type(de::Unexpected::Option, &self)),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let schema = match self.schema {
            Schema::List(inner) => inner,
            Schema::Any | Schema::Values => self.schema,
            _ => return Err(A::Error::invalid_type(de::Unexpected::Seq, &self)),
        };
        let list = PyList::empty(self.py);
        while let Some(item) = access.next_element_seed(Seed { schema, py: self.py })? {
            list.append(item).map_err(python_error)?;
        }
        Ok(list.into_any())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let dict = PyDict::new(self.py);
        let (fields, strict) = match self.schema {
            Schema::Record { fields, strict, .. } => (fields, *strict),
            Schema::Any | Schema::Values => {
                while let Some(key) = access.next_key::<String>()? {
                    if matches!(self.schema, Schema::Values) && dict.contains(&key).map_err(python_error)? {
                        return Err(A::Error::custom(format_args!("duplicate field `{key}`")));
                    }
                    let value = access.next_value_seed(Seed { schema: self.schema, py: self.py })?;
                    dict.set_item(key, value).map_err(python_error)?;
                }
                return Ok(dict.into_any());
            }
            _ => return Err(A::Error::invalid_type(de::Unexpected::Map, &self)),
        };
        while let Some(key) = access.next_key::<String>()? {
            let Some(field) = fields.iter().find(|field| field.name == key || field.aliases.contains(&key)) else {
                if strict {
                    let names = OneOf(fields.iter().map(|field| field.name.as_str()));
                    return Err(A::Error::custom(format_args!("unknown field `{key}`, {names}")));
                }
                access.next_value::<de::IgnoredAny>()?;
                continue;
            };
            if dict.contains(&field.name).map_err(python_error)? {
                return Err(A::Error::custom(format_args!("duplicate field `{}`", field.name)));
            }
            let value = access.next_value_seed(Seed { schema: &field.schema, py: self.py })?;
            dict.set_item(&field.name, value).map_err(python_error)?;
        }
        for field in fields.iter().filter(|field| field.required) {
            if !dict.contains(&field.name).map_err(python_error)? {
                return Err(A::Error::custom(format_args!("missing field `{}`", field.name)));
            }
        }
        Ok(dict.into_any())
    }

    fn visit_enum<A: EnumAccess<'de>>(self, access: A) -> Result<Self::Value, A::Error> {
        let Schema::Variant(names) = self.schema else {
            return Err(A::Error::invalid_type(de::Unexpected::Enum, &self));
        };
        let (name, variant) = access.variant_seed(VariantSeed { names })?;
        variant.unit_variant()?;
        self.object(name)
    }
}

/// Reads the name of a unit variant.
struct VariantSeed<'a> {
    names: &'a [String],
}

impl<'de, 'a> DeserializeSeed<'de> for VariantSeed<'a> {
    type Value = &'a str;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl<'de, 'a> Visitor<'de> for VariantSeed<'a> {
    type Value = &'a str;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("variant identifier")
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Self::Value, E> {
        match self.names.iter().find(|name| *name == value) {
            Some(name) => Ok(name),
            None => {
                let names = OneOf(self.names.iter().map(String::as_str));
                Err(E::custom(format_args!("unknown variant `{value}`, {names}")))
            }
        }
    }
}

/// A reader of one kind of document.
///
/// The description is a tuple: `("any",)`, `("values",)` (any without fractions and duplicate names), `("bool",)`, `("str",)`, `("int", name, min, max)`, `("enum", [names])`, `("optional", of)`,
/// `("list", of)` or `("record", name, [(field, of, required, [aliases]), …], strict)`; a strict record refuses unknown fields.
#[pyclass(frozen)]
pub struct JsonSchema(Schema);

#[pymethods]
impl JsonSchema {
    #[new]
    fn new(description: &Bound<'_, PyAny>) -> PyResult<Self> {
        Schema::parse(description).map(Self)
    }

    /// The value of a JSON document: dicts (given fields only), lists, strings, numbers. `ValueError` with serde_json's text.
    fn load<'py>(&self, py: Python<'py>, document: &[u8]) -> PyResult<Bound<'py, PyAny>> {
        let mut deserializer = serde_json::Deserializer::from_slice(document);
        let seed = Seed { schema: &self.0, py };
        let value = seed.deserialize(&mut deserializer).and_then(|value| deserializer.end().map(|()| value));
        value.map_err(|error| PyValueError::new_err(error.to_string()))
    }

    /// The same for a document that already is Python values (a part of `vm.json`): checked and copied.
    fn check<'py>(&self, py: Python<'py>, value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let document = crate::saved::plain(value).map_err(PyValueError::new_err)?;
        let seed = Seed { schema: &self.0, py };
        seed.deserialize(document).map_err(|error| PyValueError::new_err(error.to_string()))
    }
}

/// A Python value as serde sees it: None, bool, int, float, str, list, tuple and dict with text keys, in their order.
struct Plain<'a, 'py>(&'a Bound<'py, PyAny>);

impl Serialize for Plain<'_, '_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let value = self.0;
        let failed = |error: PyErr| S::Error::custom(error);
        if value.is_none() {
            serializer.serialize_unit()
        } else if let Ok(text) = value.cast::<PyString>() {
            serializer.serialize_str(&text.to_cow().map_err(failed)?)
        } else if let Ok(truth) = value.cast::<PyBool>() {
            serializer.serialize_bool(truth.is_true())
        } else if value.is_instance_of::<PyInt>() {
            match value.extract::<u64>() {
                Ok(number) => serializer.serialize_u64(number),
                Err(_) => serializer.serialize_i64(value.extract().map_err(failed)?),
            }
        } else if value.is_instance_of::<PyFloat>() {
            serializer.serialize_f64(value.extract().map_err(failed)?)
        } else if let Ok(dict) = value.cast::<PyDict>() {
            let mut map = serializer.serialize_map(Some(dict.len()))?;
            for (key, item) in dict {
                map.serialize_entry(&Plain(&key), &Plain(&item))?;
            }
            map.end()
        } else {
            let mut items = serializer.serialize_seq(None)?;
            for item in value.try_iter().map_err(failed)? {
                items.serialize_element(&Plain(&item.map_err(failed)?))?;
            }
            items.end()
        }
    }
}

/// One line without spaces, everything beyond ASCII escaped: clients read replies in pieces that may cut a character.
struct Ascii;

impl serde_json::ser::Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        for character in fragment.chars() {
            if character.is_ascii() {
                writer.write_all(&[character as u8])?;
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}

/// A plain value as one line of JSON in ASCII. `ValueError` for what JSON does not have.
#[pyfunction]
pub fn json_line<'py>(value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    let mut line = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut line, Ascii);
    Plain(value).serialize(&mut serializer).map_err(|error| PyValueError::new_err(error.to_string()))?;
    Ok(PyBytes::new(value.py(), &line))
}

/// A string as Rust's `{:?}` prints it; Cloud Hypervisor quotes paths in messages so.
#[pyfunction]
pub fn debug_text(text: &Bound<'_, PyString>) -> PyResult<String> {
    Ok(format!("{:?}", text.to_cow()?))
}
