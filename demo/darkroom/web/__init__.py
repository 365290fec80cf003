"""The studio: pictures over HTTP, and a page where one comes up as a print does in its tray."""
