//! How most settings are bound to a field: read into it, and written from it.

/// A field with a value of its own: read by a function from text, written where it differs from the default.
macro_rules! value {
    (config.$field:ident, $parse:expr) => {
        FieldBinding {
            read: |reader, setting, options| {
                options.config.$field = reader.value(setting, $parse)?;
                Ok(())
            },
            write: |config, default| Written::differing(&config.$field, &default.$field),
        }
    };
    (run.$field:ident, $parse:expr) => {
        FieldBinding {
            read: |reader, setting, options| {
                options.run.$field = reader.value(setting, $parse)?;
                Ok(())
            },
            write: |_, _| Written::Nothing,
        }
    };
}

/// A boolean field: false unless it is asked for.
macro_rules! switch {
    (config.$field:ident) => {
        FieldBinding {
            read: |reader, setting, options| {
                options.config.$field = reader.switch(setting)?;
                Ok(())
            },
            write: |config, _| Written::switch(config.$field),
        }
    };
    (run.$field:ident) => {
        FieldBinding {
            read: |reader, setting, options| {
                options.run.$field = reader.switch(setting)?;
                Ok(())
            },
            write: |_, _| Written::Nothing,
        }
    };
}

/// A field that is empty unless it is given: read by a method of [`OptionReader`](super::reader::OptionReader), written by a
/// function to text.
macro_rules! list {
    (config.$field:ident, $read:expr, $write:expr) => {
        FieldBinding {
            read: |reader, setting, options| {
                options.config.$field = $read(reader, setting)?;
                Ok(())
            },
            write: |config, _| Written::unless_empty($write(&config.$field)),
        }
    };
}

/// Text that is only looked at where it is used; `None` unless it is given.
macro_rules! text {
    (run.$field:ident) => {
        FieldBinding {
            read: |reader, setting, options| {
                options.run.$field = reader.noted_text(setting).map(Into::into);
                Ok(())
            },
            write: |_, _| Written::Nothing,
        }
    };
}

pub(super) use {list, switch, text, value};
