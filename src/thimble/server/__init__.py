"""One base and many adapters behind the HTTP interface of OpenAI, for `thimble serve`."""
