"""What only a gateway runs. It holds clients' connections and picks an agent for each request."""
