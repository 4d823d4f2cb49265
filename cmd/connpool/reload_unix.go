//go:build !windows && !js && !plan9

package main

import (
	"os"
	"os/signal"
	"syscall"
)

// reloadSignal returns the signal by which an operator asks to read the certificates
// again.
func reloadSignal() (<-chan os.Signal, func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGHUP)
	return c, func() { signal.Stop(c) }
}

// ignoreBrokenPipes keeps the process alive when the reader of its output has gone. By
// default the next write to a broken pipe would end the process.
func ignoreBrokenPipes() { signal.Ignore(syscall.SIGPIPE) }
