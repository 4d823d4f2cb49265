//go:build windows || js || plan9

package main

import "os"

// reloadSignal: there is no such signal here; the files are looked at.
func reloadSignal() (<-chan os.Signal, func()) { return nil, func() {} }
