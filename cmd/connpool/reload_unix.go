//go:build !windows && !js && !plan9

package main

import (
	"os"
	"os/signal"
	"syscall"
)

// reloadSignal is how an operator asks for the certificates to be read again.
func reloadSignal() (<-chan os.Signal, func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGHUP)
	return c, func() { signal.Stop(c) }
}

// ignoreBrokenPipes: whoever reads what a long-lived process says may leave
// before it does. By default that ends the process at its next word.
func ignoreBrokenPipes() { signal.Ignore(syscall.SIGPIPE) }
