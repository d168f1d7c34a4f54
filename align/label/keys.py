"""The page's keyboard: which key presses which button."""

from __future__ import annotations

import json

# By the button's element id.
KEYS = {
    "left": ("1", "ArrowLeft"),
    "tie": ("0", "ArrowDown"),
    "right": ("2", "ArrowRight"),
    "back": ("Backspace",),
}
# Not while somebody writes, and not again while a key is held.
HEAD = """<script>
const buttonOfKey = %s;
document.addEventListener("keydown", event => {
  const at = event.target;
  const writes = ["INPUT", "TEXTAREA"].includes(at.tagName) && !at.disabled && !at.readOnly;
  if (writes || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const button = document.getElementById(buttonOfKey[event.key] || "");
  if (button && !button.disabled) { event.preventDefault(); button.click(); }
});
</script>""".replace("%s", json.dumps({key: button for button, names in KEYS.items() for key in names}))
