package main

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"time"
)

// unknown stands for a number that this system does not provide.
const unknown = -1

// footprint counts the resources of a process that a pool could leak.
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

// beyond returns how much more fp holds than before, 0 if it holds no more, and unknown
// if either number is unknown.
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

// openNetpoller makes the runtime open the descriptors that it opens with the first
// socket and keeps for good. If the first socket were opened after the baseline, they
// would look like a leak.
func openNetpoller() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("no loopback to work on: %w", err)
	}
	return l.Close()
}

// eventually calls done repeatedly, for at most limit, until it returns true. The events
// waited for here (a peer notices a close, a goroutine ends) send no signal.
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
