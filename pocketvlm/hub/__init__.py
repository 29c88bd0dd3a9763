"""Results on a hub: what is pushed, as one commit, and pulled again, checked before it is used.

`content` says what a folder holds and which of its files travel; `client` turns what the hub's
client raises into one line; `push` and `pull` are the two directions.
"""

from pocketvlm.hub.content import Content, Kind, read_content
from pocketvlm.hub.pull import Pulled, pull
from pocketvlm.hub.push import Pushed, push

__all__ = ["Content", "Kind", "Pulled", "Pushed", "pull", "push", "read_content"]
