"""Texts in pictures: what cases, groups and values are called is drawn as it is."""

from matplotlib import rc_context

#: Decorates what draws a picture. matplotlib takes what stands between two ``$`` for mathematics, and a name such as
#: "GE $2.0$" may be anything; the setting is nnU-Net's process's again afterwards.
names_as_they_are = rc_context({"text.parse_math": False})
