"""One file per panel of the page. A panel builds its components and says which function fills them."""
