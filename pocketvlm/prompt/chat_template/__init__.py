"""Chat templates: the one reader and the one renderer, for checkpoints and bundles alike.

A chat template is an untrusted program. `find` looks where transformers looks, `template` renders
what transformers renders; `sandbox`, with `instrument`, `filters` and `budget`, bounds its time and
memory and keeps it away from everything else.
"""

from pocketvlm.prompt.chat_template.find import TEMPLATE_FILE, find_chat_template
from pocketvlm.prompt.chat_template.template import ChatTemplate, Message

__all__ = ["TEMPLATE_FILE", "ChatTemplate", "Message", "find_chat_template"]
