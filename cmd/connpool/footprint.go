package main

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"time"
)

// unknown stands for a number that this system does not tell.
const unknown = -1

// footprint is what a process holds that a pool could leak.
type footprint struct {
	goroutines  int
	descriptors int // unknown where there is no /proc
}

func footprintNow() footprint {
	fp := footprint{goroutines: runtime.NumGoroutine(), descriptors: unknown}
	if names, err := os.ReadDir("/proc/self/fd"); err == nil {
		fp.descriptors = len(names)
	}
	return fp
}

// beyond is what fp holds more than before, 0 where it holds no more, and
// unknown where that cannot be told.
func (fp footprint) beyond(before footprint) footprint {
	more := footprint{
		goroutines:  max(0, fp.goroutines-before.goroutines),
		descriptors: unknown,
	}
	if fp.descriptors != unknown && before.descriptors != unknown {
		more.descriptors = max(0, fp.descriptors-before.descriptors)
	}
	return more
}

// openNetpoller makes the runtime open the descriptors that it keeps for good
// with the first socket, which would look like a leak if the first socket were
// opened after the baseline was taken.
func openNetpoller() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("no loopback to work on: %w", err)
	}
	return l.Close()
}

// eventually asks done again and again, for at most limit, until it says yes.
// The things waited for here (a peer that notices a close, a goroutine that
// unwinds) send no signal of their own.
func eventually(limit time.Duration, done func() bool) bool {
	deadline := time.Now().Add(limit)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		if done() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
		<-tick.C
	}
}
