package connpool

import (
	"fmt"
	"math"
)

// Limits are the fields of [Config] that may be changed while the pool works. 0 and
// negative values have the same meaning as in Config. See [Pool.SetLimits].
type Limits struct {
	MaxOpen, MaxPerAddr           int
	MaxIdle, MaxIdlePerAddr       int
	MaxDialing, MaxDialingPerAddr int
	MaxWaiters                    int
	MinIdlePerAddr                int
}

// AddrLimits are the limits of one address, as [Config.LimitsFor] gives them. 0 in a field
// means the limit that the pool has for every address: the field of Config, or of Limits
// after a SetLimits, that the comment names. A positive value replaces that limit, whether
// it is lower or higher. The limits of the whole pool (MaxOpen, MaxIdle, MaxDialing) hold
// all the same.
type AddrLimits struct {
	MaxOpen    int // connections of the address; for MaxPerAddr. Negative: only the pool's MaxOpen limits
	MaxIdle    int // idle connections that are kept; for MaxIdlePerAddr. Negative: none is kept
	MinIdle    int // idle connections in reserve; for MinIdlePerAddr. Negative: none
	MaxDialing int // dials in flight; for MaxDialingPerAddr. Negative: only the pool's MaxDialing limits
	MaxWaiters int // borrowers that wait without a dial; for MaxWaiters. Negative: no limit
}

// perAddr is the limits that l, which is resolved, sets for every address.
func (l Limits) perAddr() AddrLimits {
	return AddrLimits{
		MaxOpen: l.MaxPerAddr, MaxIdle: l.MaxIdlePerAddr, MinIdle: l.MinIdlePerAddr,
		MaxDialing: l.MaxDialingPerAddr, MaxWaiters: l.MaxWaiters,
	}
}

// within is the limits that are in force for an address whose own limits are l: a field
// that is 0 is that of pool, the limits for every address. The limits of the pool may
// change after l was given, so MinIdle, which l and the pool may set against each other,
// gives way: it is cut to what the others let be reached.
func (l AddrLimits) within(pool AddrLimits) AddrLimits {
	const none = math.MaxInt
	fill(&l.MaxOpen, pool.MaxOpen, none)
	fill(&l.MaxIdle, pool.MaxIdle, 0)
	fill(&l.MinIdle, pool.MinIdle, 0)
	fill(&l.MaxDialing, pool.MaxDialing, none)
	fill(&l.MaxWaiters, pool.MaxWaiters, none)
	l.MinIdle = min(l.MinIdle, l.MaxIdle, l.MaxOpen-1)
	return l
}

// atMost is l with no field above that of o.
func (l AddrLimits) atMost(o AddrLimits) AddrLimits {
	return AddrLimits{
		MaxOpen: min(l.MaxOpen, o.MaxOpen), MaxIdle: min(l.MaxIdle, o.MaxIdle), MinIdle: min(l.MinIdle, o.MinIdle),
		MaxDialing: min(l.MaxDialing, o.MaxDialing), MaxWaiters: min(l.MaxWaiters, o.MaxWaiters),
	}
}

// senseless says what is wrong with l, which LimitsFor gave for one address, and what to
// change; nil if nothing is. handles is how many connections the process's limit on open
// files allows. Only what l itself says can make no sense: a field that goes beyond a
// limit of the pool is right again when that limit is raised.
func (l AddrLimits) senseless(full FullPolicy, handles int) error {
	wrong := func(format string, args ...any) error {
		return &configError{fmt.Errorf("Config.LimitsFor gave "+format, args...)}
	}
	switch {
	case l.MaxOpen > 0 && l.MaxIdle > l.MaxOpen:
		return wrong("MaxIdle %d and MaxOpen %d: lower MaxIdle, or raise MaxOpen", l.MaxIdle, l.MaxOpen)
	case l.MaxIdle < 0 && l.MinIdle > 0:
		return wrong("MinIdle %d and a negative MaxIdle, which keeps no connection: leave one of them 0", l.MinIdle)
	case l.MaxOpen > 0 && l.MinIdle >= l.MaxOpen:
		return wrong("MinIdle %d and MaxOpen %d, but MinIdle is kept beside at least one in use: lower MinIdle, or raise MaxOpen", l.MinIdle, l.MaxOpen)
	case l.MaxIdle > 0 && l.MinIdle > l.MaxIdle:
		return wrong("MinIdle %d and MaxIdle %d: lower MinIdle, or raise MaxIdle", l.MinIdle, l.MaxIdle)
	case l.MinIdle > maxMinIdle:
		return wrong("MinIdle %d for one address: use %d at most, far fewer as a rule", l.MinIdle, maxMinIdle)
	case l.MinIdle >= handles:
		return wrong("MinIdle %d, but the process's limit on open files has room for %d connections in all: lower MinIdle, or raise the limit", l.MinIdle, handles)
	case l.MaxWaiters > 0 && full == FullFail:
		return wrong("MaxWaiters %d, but under Config.WhenFull FullFail nobody waits for a limit: leave MaxWaiters 0", l.MaxWaiters)
	}
	return nil
}

// limits is the limits of cfg, unchanged.
func (cfg *Config) limits() Limits {
	return Limits{
		MaxOpen: cfg.MaxOpen, MaxPerAddr: cfg.MaxPerAddr,
		MaxIdle: cfg.MaxIdle, MaxIdlePerAddr: cfg.MaxIdlePerAddr,
		MaxDialing: cfg.MaxDialing, MaxDialingPerAddr: cfg.MaxDialingPerAddr,
		MaxWaiters: cfg.MaxWaiters, MinIdlePerAddr: cfg.MinIdlePerAddr,
	}
}

func (cfg *Config) setLimits(l Limits) {
	cfg.MaxOpen, cfg.MaxPerAddr = l.MaxOpen, l.MaxPerAddr
	cfg.MaxIdle, cfg.MaxIdlePerAddr = l.MaxIdle, l.MaxIdlePerAddr
	cfg.MaxDialing, cfg.MaxDialingPerAddr = l.MaxDialing, l.MaxDialingPerAddr
	cfg.MaxWaiters, cfg.MinIdlePerAddr = l.MaxWaiters, l.MinIdlePerAddr
}

// resolved is l with every default filled in, as [Config.resolved] does it. If two fields
// contradict each other, the error names both and the struct that they are in.
func (l Limits) resolved(in string, full FullPolicy) (Limits, error) {
	a, b, why := l.contradiction(full)
	if why != "" {
		where := in
		if b == "WhenFull" {
			where = "Config"
		}
		return Limits{}, fmt.Errorf("connpool: %s.%s and %s.%s contradict each other: %s", in, a, where, b, why)
	}
	const none = math.MaxInt
	fill(&l.MaxOpen, 0, none)
	fill(&l.MaxPerAddr, none, none)
	fill(&l.MaxIdle, none, 0)
	fill(&l.MaxIdlePerAddr, none, 0)
	fill(&l.MaxDialing, defaultMaxDialing, none)
	fill(&l.MaxDialingPerAddr, l.MaxDialing/2+l.MaxDialing%2, none)
	fill(&l.MaxWaiters, none, none)
	fill(&l.MinIdlePerAddr, 0, 0)
	return l, nil
}

// fill replaces a limit that is 0 or negative with what that means.
func fill(n *int, zero, negative int) {
	switch {
	case *n == 0:
		*n = zero
	case *n < 0:
		*n = negative
	}
}

// contradiction names two fields that contradict each other; why is "" if none do.
func (l Limits) contradiction(full FullPolicy) (a, b, why string) {
	over := func(n int, of string, limit int, by string) (string, string, string) {
		return of, by, fmt.Sprintf("%d can never be reached under %d", n, limit)
	}
	above := func(n, limit int) bool { return limit > 0 && n > limit }
	reaches := func(n, limit int) bool { return limit > 0 && n >= limit }
	switch {
	case above(l.MaxPerAddr, l.MaxOpen):
		return over(l.MaxPerAddr, "MaxPerAddr", l.MaxOpen, "MaxOpen")
	case above(l.MaxIdle, l.MaxOpen):
		return over(l.MaxIdle, "MaxIdle", l.MaxOpen, "MaxOpen")
	case above(l.MaxIdlePerAddr, l.MaxOpen):
		return over(l.MaxIdlePerAddr, "MaxIdlePerAddr", l.MaxOpen, "MaxOpen")
	case l.MaxIdle < 0 && l.MaxIdlePerAddr > 0, l.MaxIdle > 0 && l.MaxIdlePerAddr < 0:
		return "MaxIdle", "MaxIdlePerAddr", "one keeps idle connections, the other keeps none"
	case above(l.MaxIdlePerAddr, l.MaxPerAddr):
		return over(l.MaxIdlePerAddr, "MaxIdlePerAddr", l.MaxPerAddr, "MaxPerAddr")
	case above(l.MaxIdlePerAddr, l.MaxIdle):
		return over(l.MaxIdlePerAddr, "MaxIdlePerAddr", l.MaxIdle, "MaxIdle")
	case above(l.MaxDialingPerAddr, l.MaxDialing):
		return over(l.MaxDialingPerAddr, "MaxDialingPerAddr", l.MaxDialing, "MaxDialing")
	case l.MaxWaiters > 0 && full == FullFail:
		return "MaxWaiters", "WhenFull", "FullFail lets nobody wait for a limit"
	case full == FullOverflow && l.MaxPerAddr <= 0 && l.MaxOpen <= 0:
		return "MaxPerAddr", "WhenFull", "FullOverflow needs a MaxPerAddr or a MaxOpen to exceed"
	case l.MinIdlePerAddr > 0 && l.MaxIdlePerAddr < 0:
		return "MinIdlePerAddr", "MaxIdlePerAddr", "one keeps idle connections, the other keeps none"
	case l.MinIdlePerAddr > 0 && l.MaxIdle < 0:
		return "MinIdlePerAddr", "MaxIdle", "one keeps idle connections, the other keeps none"
	// The idle connections of MinIdlePerAddr are kept beside at least one in use.
	case reaches(l.MinIdlePerAddr, l.MaxOpen):
		return "MinIdlePerAddr", "MaxOpen", fmt.Sprintf("%d beside one in use can never be reached under %d", l.MinIdlePerAddr, l.MaxOpen)
	case reaches(l.MinIdlePerAddr, l.MaxPerAddr):
		return "MinIdlePerAddr", "MaxPerAddr", fmt.Sprintf("%d beside one in use can never be reached under %d", l.MinIdlePerAddr, l.MaxPerAddr)
	case above(l.MinIdlePerAddr, l.MaxIdle):
		return over(l.MinIdlePerAddr, "MinIdlePerAddr", l.MaxIdle, "MaxIdle")
	case above(l.MinIdlePerAddr, l.MaxIdlePerAddr):
		return over(l.MinIdlePerAddr, "MinIdlePerAddr", l.MaxIdlePerAddr, "MaxIdlePerAddr")
	}
	return "", "", ""
}

// maxMinIdle is more than any address can have: a system has no more local ports for one
// peer.
const maxMinIdle = 1<<16 - 1

// reachable says why MinIdlePerAddr can never be reached, even for one address; nil if it
// can. handles is how many connections the process's handle limit allows.
func (l Limits) reachable(in string, handles int) error {
	switch {
	case l.MinIdlePerAddr > maxMinIdle:
		return fmt.Errorf("connpool: %s.MinIdlePerAddr is %d for each address: use %d at most, far fewer as a rule", in, l.MinIdlePerAddr, maxMinIdle)
	case l.MinIdlePerAddr >= handles:
		return fmt.Errorf("connpool: %s.MinIdlePerAddr is %d, but the process's limit on open files has room for %d connections in all: lower MinIdlePerAddr, or raise the limit",
			in, l.MinIdlePerAddr, handles)
	}
	return nil
}
