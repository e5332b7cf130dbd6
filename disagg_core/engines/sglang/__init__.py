"""SGLang as the target engine: servers, their pool and client, and the plugin inside the server's process."""
