"""Names of cases, groups and values in figures, drawn without mathematical notation."""

from matplotlib import rc_context

#: Decorator of functions that draw figures: matplotlib would set text between two ``$``, as in a name like "GE $2.0$",
#: as mathematics. Afterwards the setting is what it was.
names_as_they_are = rc_context({"text.parse_math": False})
