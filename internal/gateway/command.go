package gateway

import "bytes"

// What a Redis command does to its connection decides how the gateway treats the command.

type class uint8

const (
	plain      class = iota // one reply, and no state left on the connection
	transacts               // MULTI, WATCH and the commands that end them
	subscribes              // several replies, and messages later
	blocks                  // one reply, at any later time
	keeps                   // leaves state on the connection, if the server accepts it
	identifies              // changes the user or the database of the client
	local                   // the gateway answers the command itself
	refused                 // the gateway does not pass the command on
	nothing                 // an empty command, which servers do not answer
)

// verb names the commands that the gateway treats specially.
type verb uint8

const (
	other verb = iota
	vMulti
	vExec
	vDiscard
	vWatch
	vUnwatch
	vSubscribe
	vPsubscribe
	vSsubscribe
	vUnsubscribe
	vPunsubscribe
	vSunsubscribe
	vAuth
	vHello
	vSelect
	vSetname
	vSetinfo
	vQuit
	vReset
	vHTTP
	vMaint

	// Later commands can undo the state that these leave behind.
	vTracking
	vNoEvict
	vNoTouch
	vReadonly
	vReadwrite
	vAsking
	vDebug
	vReply
)

type meaning struct {
	class class
	verb  verb
}

var commandTable = map[string]meaning{
	"MULTI": {transacts, vMulti}, "WATCH": {transacts, vWatch},
	// These are ordinary commands outside a transaction; see pin for one inside.
	"EXEC": {plain, vExec}, "DISCARD": {plain, vDiscard}, "UNWATCH": {plain, vUnwatch},

	"SUBSCRIBE": {subscribes, vSubscribe}, "PSUBSCRIBE": {subscribes, vPsubscribe}, "SSUBSCRIBE": {subscribes, vSsubscribe},
	"UNSUBSCRIBE": {subscribes, vUnsubscribe}, "PUNSUBSCRIBE": {subscribes, vPunsubscribe}, "SUNSUBSCRIBE": {subscribes, vSunsubscribe},

	"BLPOP": {class: blocks}, "BRPOP": {class: blocks}, "BRPOPLPUSH": {class: blocks}, "BLMOVE": {class: blocks}, "BLMPOP": {class: blocks},
	"BZPOPMIN": {class: blocks}, "BZPOPMAX": {class: blocks}, "BZMPOP": {class: blocks}, "WAIT": {class: blocks}, "WAITAOF": {class: blocks},

	"MONITOR": {class: keeps}, "READONLY": {keeps, vReadonly}, "READWRITE": {keeps, vReadwrite}, "ASKING": {keeps, vAsking},

	"AUTH": {identifies, vAuth}, "HELLO": {identifies, vHello}, "SELECT": {identifies, vSelect},

	"QUIT": {local, vQuit}, "RESET": {local, vReset},

	"SYNC": {class: refused}, "PSYNC": {class: refused}, "REPLCONF": {class: refused},
	"POST": {refused, vHTTP}, "HOST:": {refused, vHTTP},
}

// clientTable is the table of the commands CLIENT x. A command that is missing here, such
// as one of a later server, is treated with caution.
var clientTable = map[string]meaning{
	"ID": {}, "INFO": {}, "LIST": {}, "GETNAME": {}, "GETREDIR": {}, "KILL": {}, "PAUSE": {}, "UNPAUSE": {}, "UNBLOCK": {},
	"HELP": {}, "TRACKINGINFO": {},
	"SETNAME": {identifies, vSetname}, "SETINFO": {local, vSetinfo},
	"CACHING":  {class: transacts}, // affects the next command, and only while tracking is on
	"TRACKING": {keeps, vTracking}, "NO-EVICT": {keeps, vNoEvict}, "NO-TOUCH": {keeps, vNoTouch}, "REPLY": {keeps, vReply},
	// Redis clients ask on each connect for pushes about moving nodes. Behind a gateway
	// these pushes are of no use.
	"MAINT_NOTIFICATIONS": {local, vMaint},
}

// classify returns the meaning of a frame of respRequests. Only arrays have a meaning;
// the caller makes an inline command an array first.
func classify(frame []byte) meaning {
	args := argsOf(frame)
	name, ok := args.next()
	if !ok {
		return meaning{class: nothing}
	}
	var buf [24]byte
	m, known := commandTable[string(upper(buf[:0], name))]
	if known {
		return m
	}
	switch {
	case is(name, "CLIENT"):
		sub, ok := args.next()
		if !ok {
			return meaning{}
		}
		if m, known = clientTable[string(upper(buf[:0], sub))]; !known {
			m.class = keeps
		}
	case is(name, "XREAD"), is(name, "XREADGROUP"):
		for {
			arg, ok := args.next()
			if !ok || is(arg, "STREAMS") {
				break
			}
			if is(arg, "GROUP") { // skips two names, which may be any word
				args.next()
				args.next()
			}
			if is(arg, "BLOCK") {
				m.class = blocks
			}
		}
	case is(name, "SCRIPT"):
		if sub, ok := args.next(); ok && is(sub, "DEBUG") {
			m = meaning{keeps, vDebug}
		}
	}
	return m
}

// takesBack reports whether a command undoes the state that commands of its kind leave
// behind: it sets the default state.
func takesBack(v verb, frame []byte) bool {
	list := words(frame)
	last := func() []byte { // the last word of CLIENT x WORD and SCRIPT DEBUG WORD
		if len(list) < 2 {
			return nil
		}
		return list[1]
	}
	switch v {
	case vReadwrite:
		return true
	case vTracking, vNoEvict, vNoTouch:
		return is(last(), "OFF")
	case vDebug:
		return is(last(), "NO")
	case vReply:
		return is(last(), "ON")
	case vHello:
		return len(list) == 0 // without arguments the command is a query
	}
	return false
}

// silences reports whether a command is CLIENT REPLY OFF or SKIP. The server answers
// neither that command nor those after it, so replies can no longer be counted.
func silences(v verb, frame []byte) bool {
	if v != vReply {
		return false
	}
	list := words(frame)
	return len(list) == 2 && (is(list[1], "OFF") || is(list[1], "SKIP"))
}

// upper appends name in upper case to dst, or nothing if name does not fit: no command of
// the tables is that long.
func upper(dst, name []byte) []byte {
	if len(name) > cap(dst) {
		return dst
	}
	for _, c := range name {
		if 'a' <= c && c <= 'z' {
			c -= 'a' - 'A'
		}
		dst = append(dst, c)
	}
	return dst
}

// is compares a name as Redis does, ignoring the case of ASCII letters.
func is(name []byte, want string) bool {
	if len(name) != len(want) {
		return false
	}
	for i, c := range name {
		if 'a' <= c && c <= 'z' {
			c -= 'a' - 'A'
		}
		if c != want[i] {
			return false
		}
	}
	return true
}

// words returns the arguments of a frame, without the command's name.
func words(frame []byte) (list [][]byte) {
	args := argsOf(frame)
	args.next()
	for {
		arg, ok := args.next()
		if !ok {
			return list
		}
		list = append(list, arg)
	}
}

// respErrors has the error reply for each failure.
var respErrors = [numFailures]string{
	lost:        "the connection to the server was lost before it answered; the command may have been carried out",
	late:        "the server did not answer in time; the command may have been carried out",
	unreachable: "the server cannot be reached; the command was not sent",
	busy:        "every connection to the server was in use for too long; the command was not sent",
	tooLong:     "the reply is longer than the gateway passes on; the command was carried out",
	noMemory:    "the gateway has no room for the reply; the command was carried out",
	outOfStep:   "what the server said was no answer to the command, which may have been carried out",
	ending:      "the gateway is ending; the command may have been carried out",
	speaks:      "the server speaks before it is asked, so its answers cannot be told from what it says by itself; the command was not sent",
	pinsFull:    "as many clients as -max-pinned allows have a connection to themselves; the command was not sent",
	left:        "the client left; the command was not sent",
}

func respFailure(_ *Config, dst, _ []byte, why failure) []byte {
	dst = append(dst, "-ERR gateway: "...)
	dst = append(dst, respErrors[why]...)
	return append(dst, "\r\n"...)
}

// isError reports whether a reply is an error.
func isError(reply []byte) bool {
	reply = bare(reply)
	return len(reply) > 0 && (reply[0] == '-' || reply[0] == '!')
}

func hasPrefix(reply []byte, prefix string) bool { return bytes.HasPrefix(reply, []byte(prefix)) }
