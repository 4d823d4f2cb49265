package connpooltest

import (
	"bytes"
	"fmt"
	"strings"
)

// FailureKind is the class of a [Failure].
type FailureKind uint8

const (
	// Misdelivered: an exchange reported success with the reply to another request, or
	// with a part of it. A reply reached the wrong borrower.
	Misdelivered FailureKind = iota + 1
	// Unanswered: an exchange reported success without its reply.
	Unanswered
	// NotReturned: connections were in use when every exchange had returned.
	NotReturned
	// Stuck: an exchange had not returned a minute after the end of its ctx.
	Stuck
	// Crashed: an exchange panicked, or ended its goroutine.
	Crashed
	// Unseen: an exchange reported success, and no request had contained its token, so
	// the script had no effect on it.
	Unseen
	// Leaked: goroutines were left when the client had ended. Only a bubble shows it.
	Leaked
)

func (k FailureKind) String() string {
	names := []string{"misdelivered", "unanswered", "not returned", "stuck", "crashed", "unseen", "leaked"}
	if k == 0 || int(k) > len(names) {
		return fmt.Sprintf("FailureKind(%d)", uint8(k))
	}
	return names[k-1]
}

// Failure is the error of a script under which the client failed.
type Failure struct {
	Kind   FailureKind
	Text   string   // what happened, in a sentence
	Script Script   // the script that made it happen
	Step   int      // number of the step in Script, from 0; -1 if no step is to blame alone
	Asked  string   // the token of the step
	Got    string   // the reply that the step reported
	Log    []string // what happened, a line each: the time since the start, the step, the event
}

// Error is the text, the script and the log, on several lines.
func (f *Failure) Error() string {
	return fmt.Sprintf("connpooltest: %s\nscript: %s\n%s", f.Text, f.Script, strings.Join(f.Log, "\n"))
}

func (r *run) failure(c *call, kind FailureKind, format string, args ...any) *Failure {
	f := &Failure{Kind: kind, Text: fmt.Sprintf(format, args...), Step: c.number, Asked: c.token}
	if c.isDone() {
		f.Got = c.reply
	}
	return f
}

// judge says what is wrong with a call that is over; nil if nothing is.
func (r *run) judge(c *call) *Failure {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case c.panicked != nil:
		return r.failure(c, Crashed, "step %d (%v) panicked: %v", c.number, c.step, c.panicked)
	case c.exited:
		return r.failure(c, Crashed, "step %d (%v) ended its goroutine", c.number, c.step)
	case c.err != nil:
		return nil
	}
	for _, o := range r.calls {
		if o != c && strings.Contains(c.reply, o.token) {
			return r.failure(c, Misdelivered, "a reply reached the wrong borrower: step %d asked for %s, and got %q, the reply to step %d", c.number, c.token, c.reply, o.number)
		}
	}
	if strings.Contains(c.reply, c.token) {
		if !isClosed(c.reached) {
			return r.failure(c, Unseen, "step %d asked for %s and succeeded, and no request contained this token: the harness knows the exchanges by their tokens", c.number, c.token)
		}
		return nil
	}
	if !r.h.Matched && (c.step.Fault == Ahead || c.step.Fault == Wrong) {
		return nil
	}
	// A part of a reply without the token is somebody's, too.
	for _, o := range r.calls {
		if o != c && len(c.reply) > 1 && bytes.Contains(o.sent, []byte(c.reply)) && !bytes.Contains(c.sent, []byte(c.reply)) {
			return r.failure(c, Misdelivered, "a part of a reply reached the wrong borrower: step %d asked for %s, and got %q of the reply to step %d", c.number, c.token, c.reply, o.number)
		}
	}
	return r.failure(c, Unanswered, "an exchange reported success without its reply: step %d asked for %s, and got %q", c.number, c.token, c.reply)
}
